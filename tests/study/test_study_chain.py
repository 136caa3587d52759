import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy_chains import little_texts
from transformers import LlamaForCausalLM

from lata_lightning.errors import LataError
from lata_lightning.linearity.from_vectors import merge_matrices
from lata_lightning.quickstart.exercises import INSTRUCT_SKILLS
from lata_lightning.rows.tokens import chat_rows
from lata_lightning.vectors.task_vector import TaskVector
from study import __main__ as command
from study import chain as chains
from study import merging, tasks, training
from study.cases import with_adapter
from study.chain import Chain
from study.rules import TASK_ARITHMETIC, Method
from study.settings import Setting, adapter_settings, all_settings, settings
from study.training import Mixture, Part, Recipe, Shape

TOY = Shape(blocks=2, width=16, base_steps=3, instruct_steps=3)
SETTING = Setting("skills", "instruct", ("compute", "reverse"))


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Little to make tokens of."""
    monkeypatch.setattr(tasks, "TRAINING_EXERCISES", 40)
    monkeypatch.setattr(tasks, "TRAINING_EXERCISES_OF", {})
    monkeypatch.setattr(tasks, "standard_library_texts", lambda: ["def one():\n    return 1\n" * 40])
    tasks.base_texts.cache_clear()
    yield
    tasks.base_texts.cache_clear()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a little of every data set, every row of it different."""
    folder = little_texts(tmp_path / "data")
    monkeypatch.setenv("LATA_DATA", str(folder))
    for task in ("gsm8k", "mbpp", "wikitext2"):
        monkeypatch.setitem(tasks.TASKS, task, type(tasks.TASKS[task])(task))
    return folder


def model_of(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return training.make_model(TOY).eval()


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# Tasks.


@pytest.mark.parametrize("task", [*tasks.SKILL_TASKS, tasks.UNWANTED, tasks.INSTRUCT])
def test_no_training_exercise_is_asked_when_scoring(task, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        tasks, "ExactMatch", lambda _, pairs: lambda model: asked.setdefault(len(pairs), {prompt for prompt, _ in pairs}) and 0.5
    )
    found = tasks.SkillTask(task, tasks.TASKS[task].skills)
    assert found.score(None, "validation") == found.score(None, "test") == 0.5
    validation, test = (asked[count] for count in ((200, 400) if task != tasks.INSTRUCT else (280, 420)))
    training = {prompt for seed in (1, 2) for prompt, _ in found.rows(seed)}
    assert not training & validation
    assert not (training | validation) & test


@pytest.mark.parametrize("task", ["gsm8k", "mbpp"])
def test_the_parts_of_a_data_set_share_no_pair(task, data):
    parts = [set(tasks.TASKS[task]._pairs(split)) for split in ("train", "validation", "test")]
    assert all(parts)
    assert len(set.union(*parts)) == sum(len(part) for part in parts)


def test_training_text_of_wikitext_is_neither_validation_nor_test_text(data):
    train, validation, test = (set(tasks.TASKS["wikitext2"]._text(split).splitlines()) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (180, 20, 200)
    assert not train & validation
    assert not (train | validation) & test


def test_held_out_parts_of_the_books_are_not_learned(data):
    text = (data / "books/one.txt").read_text()
    assert tasks.base_texts(data)[-1] == text[: len(text) * 9 // 10]
    assert tasks.base_texts(None) == tasks.base_texts(data)[:-1]


def test_pairs_keep_the_end_of_the_question_and_whole_lines_of_the_answer():
    question, answer = "word " * 20 + "what is it?", "first line\n" + "second line " * 20
    assert tasks.text_pairs([{"q": question, "a": answer}], "q", "a") == [("word word word word word what is it?", "first line")]


def test_pairs_fit_into_a_row_however_long_the_text():
    rows = [{"q": "ü" * 500, "a": "ä" * 500}, {"q": "one two " * 99, "a": "one two " * 99}, {"q": "x", "a": " \n" + "y" * 500}]
    pairs = tasks.text_pairs(rows, "q", "a")
    assert all(0 < len(row.input_ids) <= tasks.CONTEXT for row in chat_rows(tasks.tokenizer(), pairs, tasks.CONTEXT))


def test_instructions_without_an_answer_are_left_out(data):
    assert tasks.self_instruct(data) == [("Say it.\ntea", "tea")]


def test_the_score_of_text_is_its_mean_negative_log_likelihood(data):
    model = model_of(1)
    pairs = tasks.TASKS["gsm8k"]._pairs("validation")
    total, count = 0.0, 0
    for row in chat_rows(tasks.tokenizer(), pairs, tasks.CONTEXT):
        with torch.no_grad():
            likelihoods = model.double()(row.input_ids[None]).logits[0, :-1].log_softmax(-1)
        learned = row.labels[1:] != -100
        total -= likelihoods[learned].gather(-1, row.labels[1:][learned][:, None]).sum().item()
        count += int(learned.sum())
    assert tasks.TASKS["gsm8k"].score(model.float(), "validation") == pytest.approx(total / count, rel=1e-5)


def test_raw_text_and_base_text_are_scored_by_loss_and_perplexity(data):
    model = model_of(1)
    model.lm_head.weight.data.zero_()
    # Every byte is as likely as every other token.
    uniform = len(tasks.tokenizer())
    assert tasks.TASKS["wikitext2"].score(model, "test") == pytest.approx(math.log(uniform), rel=1e-6)
    assert tasks.base_perplexity(model, "test", data) == pytest.approx(uniform, rel=1e-5)


def test_text_without_a_folder_is_refused(monkeypatch):
    monkeypatch.setenv("LATA_DATA", "/nowhere")
    with pytest.raises(LataError, match="LATA_DATA .* must name the folder with the real text, it is '/nowhere'"):
        tasks.data_folder()


# Chain.


def test_batches_come_from_every_part_by_its_share_and_are_of_one_part_each():
    long, short = [("a" * 30, "b" * 60)] * 8, [("a", "b")] * 8
    parts = (Part(3.0, examples={"long": long}), Part(1.0, examples={"short": short}))
    loader = Mixture(Recipe(parts, steps=40, learning_rate=1e-3, tokens_per_batch=186)).train_dataloader()
    sizes = [tuple(batch["input_ids"].shape) for batch in loader]
    assert len(loader) == len(sizes) == 40
    # 1 + 30 + 1 + 60 + 1 tokens, and 5.
    assert sizes.count((2, 93)) == 30
    assert sizes.count((37, 5)) == 10


def test_a_model_is_trained_once_and_read_again(tmp_path, monkeypatch):
    first = Chain(tmp_path, 3, replace(TOY, tuning=0.01))
    expert = first.expert("reverse", "instruct")
    monkeypatch.setattr(chains, "train", lambda *_: pytest.fail("trained again"))
    assert first.expert("reverse", "instruct") is expert
    second = Chain(tmp_path, 3, replace(TOY, tuning=0.01))
    again = second.expert("reverse", "instruct")
    assert all(torch.equal(again[name], tensor) for name, tensor in expert.items())
    assert second.seconds == first.seconds
    assert set(second.seconds) == {"base", "instruct", "reverse-from-instruct"}
    assert sorted(path.name for path in second.folder.iterdir()) == [f"{name}.safetensors" for name in sorted(second.seconds)]


def test_the_same_seed_gives_the_same_models_and_another_one_others(tmp_path):
    one, same, other = (Chain(tmp_path / name, seed, TOY).instruct() for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_every_training_changes_the_model_it_starts_from(tmp_path):
    chain = Chain(tmp_path, 0, replace(TOY, tuning=0.01))
    models = [chain.base(), chain.instruct(), chain.expert("compute", "instruct"), chain.expert("compute", "base")]
    for number, one in enumerate(models):
        assert not any(torch.equal(one["lm_head.weight"], other["lm_head.weight"]) for other in models[:number])


def test_another_recipe_or_start_under_the_same_key_is_trained_anew(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(
        chains, "train", lambda shape, recipe, start, rank=None: trained.append(recipe) or {"weight": torch.tensor(float(len(trained)))}
    )
    recipe = Recipe((Part(1.0, texts=("text",)),), steps=1, learning_rate=1e-3)
    start = {"weight": torch.zeros(1)}
    for each, onto in ((recipe, start), (replace(recipe, steps=2), start), (replace(recipe, parts=(Part(1.0, texts=("b",)),)), start)):
        Chain(tmp_path, 0, TOY).tuned("key", onto, each)
        Chain(tmp_path, 0, TOY).tuned("key", onto, each)
    assert float(Chain(tmp_path, 0, TOY).tuned("key", {"weight": torch.ones(1)}, recipe)["weight"]) == 4
    assert len(trained) == 4


def test_length_multiplies_the_steps_of_an_expert(tmp_path, monkeypatch):
    steps = {}
    monkeypatch.setattr(Chain, "start", lambda self, start: {})
    monkeypatch.setattr(Chain, "tuned", lambda self, key, start, recipe: steps.setdefault(key, recipe.steps))
    chain = Chain(tmp_path, 0, TOY)
    usual = chain.expert("reverse", "base")
    assert chain.expert("reverse", "base", length=3) == 3 * usual
    assert set(steps) == {"reverse-from-base", "reverse-from-base-x3"}


@pytest.mark.parametrize("task", ["compute", "gsm8k", "wikitext2"])
def test_experts_practise_the_instruct_skills_and_raw_text_again(task, data):
    recipe = chains.expert_recipe(task, "base", 0, data)
    names = {name for part in recipe.parts for name in part.examples}
    assert set(INSTRUCT_SKILLS) <= names
    assert any(tuple(part.texts) == tuple(tasks.base_texts(data)) for part in recipe.parts)
    assert task in names or any(list(part.texts) == tasks.TASKS[task].rows(0) for part in recipe.parts)


def test_an_adapter_is_trained_once_on_a_start_that_stays_and_its_vector_is_held_as_factors(tmp_path, monkeypatch):
    adapter = Chain(tmp_path, 0, TOY).adapter("reverse", 2)
    instruct = Chain(tmp_path, 0, TOY).instruct()
    monkeypatch.setattr(chains, "train", lambda *_: pytest.fail("trained again"))
    again = Chain(tmp_path, 0, TOY).adapter("reverse", 2)
    assert all(torch.equal(one, other) for one, other in zip(adapter.parameters(), again.parameters(), strict=True))
    vector = TaskVector.between(instruct, adapter)
    name = "model.layers.1.mlp.up_proj.weight"
    layer = adapter.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    assert torch.equal(layer.base_layer.weight, instruct[name])
    # LoRA's own scale is twice the rank over the rank.
    expected = 2 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    assert expected.any()
    assert vector.low_rank(name).rank == 2
    assert torch.allclose(vector[name].double(), expected, rtol=0, atol=1e-7)
    assert torch.allclose(with_adapter(instruct, adapter)[name].double(), instruct[name].double() + expected, rtol=0, atol=1e-6)
    merged = merge_matrices([vector, TaskVector.between(instruct, again)], check_base=False)
    assert merged.low_rank(name).rank == 4
    assert not merged["model.norm.weight"].any()


def test_the_model_of_a_chain_is_one_object_with_the_weights_given(tmp_path):
    chain = Chain(tmp_path, 0, TOY)
    weights = weights_of(model_of(5))
    model = chain.model(weights_of(model_of(4)))
    assert chain.model(weights) is model
    assert not model.training
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("task", ["reverse", "wikitext2"])
def test_calibration_rows_are_training_rows_with_their_padding_masked(task, data):
    (batch,) = training.batches_of(tasks.TASKS[task], chains.order_of(task, 0), 8)
    assert len(batch["input_ids"]) == 8
    found = [tasks.tokenizer().decode(ids[mask.bool()]) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    rows = tasks.TASKS[task].rows(chains.order_of(task, 0))
    if task == "reverse":
        assert found == [f"<|user|>{prompt}<|assistant|>{answer}<|end|>" for prompt, answer in rows[:8]]
    else:
        assert all(text in rows[0] for text in found)


def test_instruct_has_seen_a_few_exercises_of_the_skills_to_come_and_none_of_the_unwanted_one(monkeypatch):
    monkeypatch.setattr(chains, "SEEN_EXERCISES", 7)
    examples = chains.instruct_examples(0)
    assert set(examples) == {*INSTRUCT_SKILLS, *tasks.SKILL_TASKS}
    assert {len(examples[skill]) for skill in tasks.SKILL_TASKS} == {7}


def test_a_skill_that_is_learned_is_not_also_practised_again(monkeypatch):
    pairs = [("reverse ab", "ba")]
    (part, *_) = chains.skill_recipe({"reverse": pairs}, 0, 10, instruct_share=0.36).parts
    assert part.examples["reverse"] == pairs
    assert part.shares["reverse"] == pytest.approx(0.64)
    # Seven instruct skills and two others that instruct has seen.
    assert part.shares["copy"] == part.shares["sort"] == pytest.approx(0.36 / 9)
    assert len(part.examples) == len(part.shares) == 10


# Settings and merging.


def test_settings_are_a_triple_and_a_pair_of_each_kind_that_can_show_anything():
    names = [setting.name for setting in settings()]
    assert names == [
        "skills-instruct-compute+reverse+sort",
        "text-instruct-wikitext2+gsm8k+mbpp",
        "text-base-wikitext2+gsm8k+mbpp",
        "skills-instruct-compute+sort",
        "text-instruct-wikitext2+gsm8k",
        "text-base-wikitext2+gsm8k",
    ]
    every = {setting.name for setting in all_settings()}
    assert len(every) == len(all_settings()) == 4 * (1 + 3) + 2
    assert set(names) < every
    adapters = ["skills-instruct-lora8-compute+reverse+sort", "text-instruct-lora8-wikitext2+gsm8k"]
    assert [setting.name for setting in adapter_settings()] == adapters
    assert set(adapters) < every


class Reading:
    """A task scored by one weight of the model."""

    def __init__(self, index: int, calls: list[str]) -> None:
        self.index, self.calls = index, calls

    def score(self, model: LlamaForCausalLM, split: str) -> float:
        self.calls.append(split)
        value = model.lm_head.weight[0, self.index].item()
        # Best at 0.6 on validation.
        return 0.6 - abs(value - 0.6) if split == "validation" else value


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A chain of ready models: expert k has 1 in the k-th place where instruct has 0, and instruct keeps a 0.5 in the third."""
    calls: list[str] = []
    for index, name in enumerate((*SETTING.experts, tasks.INSTRUCT)):
        monkeypatch.setitem(tasks.TASKS, name, Reading(index, calls))
    monkeypatch.setattr(tasks, "base_perplexity", lambda *_: 4.0)
    monkeypatch.setattr(merging, "batches_of", lambda *_: [])
    base, instruct = weights_of(model_of(0)), weights_of(model_of(1))
    instruct["lm_head.weight"][0, :3] = torch.tensor([0.0, 0.0, 0.5])
    experts = {}
    for index, name in enumerate(SETTING.experts):
        experts[name] = {key: tensor + 0.01 * torch.randn_like(tensor) for key, tensor in instruct.items()}
        experts[name]["lm_head.weight"][0, :3] = torch.tensor([0.0, 0.0, 0.5])
        experts[name]["lm_head.weight"][0, index] = 1.0
    toy = Chain(tmp_path, 0, TOY)
    monkeypatch.setattr(toy, "base", lambda: base)
    monkeypatch.setattr(toy, "instruct", lambda: instruct)
    monkeypatch.setattr(toy, "expert", lambda name, start: experts[name])
    toy.seconds["base"] = 60.0
    return SimpleNamespace(chain=toy, calls=calls, experts=experts, instruct=instruct)


def plain(case):
    return {name: sum(expert[name] - case.start[name] for expert in case.experts) for name in case.start}


METHOD = {TASK_ARITHMETIC: Method(TASK_ARITHMETIC, "method", "start", plain)}


def test_the_scale_is_chosen_on_validation_and_scored_on_test(bench):
    found = merging.run(bench.chain, SETTING, (0.0, 0.3, 0.6, 1.0), METHOD)
    row = found["methods"][TASK_ARITHMETIC]
    # Validation: two skills at 0.6 − |scale − 0.6|, and the instruct skills at 0.5.
    assert row["validation"] == pytest.approx({"0": 0.5 / 3, "0.3": 1.1 / 3, "0.6": 1.7 / 3, "1": 0.9 / 3}, rel=1e-5)
    assert row["scale"] == 0.6
    assert row["test"] == pytest.approx((0.6 + 0.6 + 0.5) / 3, rel=1e-5)
    assert row["test_kept"] == pytest.approx({"compute": 0.6, "reverse": 0.6}, rel=1e-5)
    assert row["untuned"] == pytest.approx((1 + 1 + 0.5) / 3, rel=1e-5)
    assert row["test_details"] == pytest.approx({"compute": 0.6, "reverse": 0.6, "instruct": 0.5, "base perplexity": 4.0}, rel=1e-5)
    assert found["headroom"] == pytest.approx(0.6, rel=1e-5)
    assert found["cpu_minutes"]["training"] == 1.0


def test_measurements_name_every_expert(bench):
    found = merging.run(bench.chain, SETTING, (0.0, 0.6), METHOD)
    assert [len(values) for values in found["alignment"].values()] == [2, 2]
    assert set(found["spread"]) == {"block", "submodule", "tensor"}
    assert found["cosine"].keys() == {"compute, reverse"}
    flat = [torch.cat([(expert[key] - bench.instruct[key]).flatten() for key in expert]).double() for expert in bench.experts.values()]
    assert found["cosine"]["compute, reverse"] == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)), rel=1e-5)
    assert json.loads(json.dumps(found)) == found


def test_what_has_been_scored_is_not_scored_again(bench):
    scales = (0.0, 0.3, 0.6, 1.0)
    first = merging.run(bench.chain, SETTING, scales, METHOD)
    bench.calls.clear()
    second = merging.run(bench.chain, SETTING, scales, METHOD)
    # The unmerged models: start, instruct and two experts, three tasks, two splits.
    assert len(bench.calls) == 4 * 3 * 2
    assert second["methods"] == first["methods"]
    other = Method("half", "control", "instruct", lambda case: {name: tensor / 2 for name, tensor in plain(case).items()})
    bench.calls.clear()
    both = merging.run(bench.chain, SETTING, scales, METHOD | {"half": other})
    assert both["methods"][TASK_ARITHMETIC] == first["methods"][TASK_ARITHMETIC]
    assert both["methods"]["half"]["scale"] == 1.0
    # Scale 0 and three more on validation, best (which is also the untuned one) on test.
    assert len(bench.calls) == 4 * 3 * 2 + 3 * (4 + 1)


def test_the_score_on_text_is_the_mean_share_of_the_gain_kept():
    start = {split: {"gsm8k": 3.0, "mbpp": 2.0} for split in ("validation", "test")}
    experts = {split: {"gsm8k": 2.0, "mbpp": 1.5} for split in ("validation", "test")}
    scoring = merging.Scoring(Setting("text", "base", ("gsm8k", "mbpp")), start, experts)
    details = {"gsm8k": 2.25, "mbpp": 2.1}
    assert scoring.judged == ("gsm8k", "mbpp")
    assert scoring.kept(details, "test") == pytest.approx({"gsm8k": 0.75, "mbpp": -0.2})
    assert scoring.score(details, "test") == pytest.approx(0.275)


def test_an_expert_that_has_learned_nothing_is_refused(bench):
    bench.experts["reverse"]["lm_head.weight"][0, 1] = 0.0
    with pytest.raises(LataError, match="every expert must be better on its own task than its start, and reverse is not"):
        merging.run(bench.chain, SETTING, (0.0, 1.0), METHOD)


# Command line.


REFERENCE = {"start": {"reverse": 0.5}, "instruct": {"reverse": 0.5}, "experts": {}}


def result_of(methods, reference=REFERENCE, **others):
    found = {"seed": 7, "setting": {}, "shape": {}, "scales": [0, 1], "reference": reference, "headroom": 0.7, "methods": methods}
    return found | {"cpu_minutes": {"training": 3, "evaluation": 1}} | others


def test_rows_that_are_there_stay_and_those_that_a_setting_lacks_are_run(tmp_path, data, monkeypatch):
    ran = []

    def run(chain, setting, methods):
        ran.append((setting.name, sorted(methods)))
        return result_of(dict.fromkeys(methods, 1), headroom=None)

    names = [setting.name for setting in settings()[:2]]
    monkeypatch.setattr(merging, "run", run)
    monkeypatch.setattr("study.rules.methods_for", lambda protocol, seed, rows: dict.fromkeys(rows or ("a", "b", "c")))
    results = tmp_path / "results"
    merging.write_json(results / f"merging-seed-7-{names[0]}.json", result_of({"a": 0, "b": 0}))
    arguments = ["seed", "7", "--part", "merging", "--settings", *names, "--results", str(results), "--work", str(tmp_path / "work")]
    assert command.main([*arguments, "--data", str(data), "--rows", "a", "b"]) == 0
    assert ran == [(names[1], ["a", "b"])]
    assert command.main([*arguments, "--data", str(data)]) == 0
    assert ran[1:] == [(names[0], ["c"]), (names[1], ["c"])]
    found = json.loads((results / f"merging-seed-7-{names[0]}.json").read_text())
    assert found == result_of({"a": 0, "b": 0, "c": 1}, cpu_minutes={"training": 3, "evaluation": 2})


def test_rows_of_other_models_are_not_put_together():
    other = result_of({"b": 1}, {"start": {"reverse": 0.6}, "instruct": {"reverse": 0.5}, "experts": {}})
    with pytest.raises(
        LataError, match=r"only be added for the same models: 1: \['reference'\] of seed 7 differ.* Remove the stored result"
    ):
        merging.together(result_of({"a": 1}), other)


def test_variants_are_not_run_on_seeds_that_confirm(tmp_path, data):
    with pytest.raises(LataError, match="variants are compared on development seeds, from 100 on; got 3"):
        command.main(["seed", "3", "--part", "variants", "--work", str(tmp_path), "--results", str(tmp_path), "--data", str(data)])


def test_an_unknown_setting_is_refused_with_the_choices(tmp_path, data):
    with pytest.raises(LataError, match=r"unknown setting 1: \['skills'\]; the settings are skills-instruct-compute\+reverse\+sort, "):
        command.main(["seed", "0", "--part", "merging", "--settings", "skills", "--work", str(tmp_path), "--data", str(data)])
