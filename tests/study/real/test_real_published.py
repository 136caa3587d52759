import argparse
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lata_lightning.errors import LataError, OutputError, SourceError
from lata_lightning.merging.merge import merge
from lata_lightning.quickstart.make_checkpoints import make_tokenizer
from lata_lightning.store.model_directory import verify_merged
from study.cases import Case
from study.real.command import add_arguments, run
from study.real.published import benchmark as benchmark_module
from study.real.published import scoring
from study.real.published.benchmark import Benchmark, Options, summary
from study.real.published.configuration import Expert, checked, empty_model, needs, read_configuration, with_models
from study.real.published.scoring import HeldOut, gains, kept, open_model, score_tasks, text_files
from study.real.published.streamed import PAPER, STREAMED, check_methods
from study.real.published.texts import made_texts
from study.real.published.tiny import tiny_configuration
from study.rules import METHODS, methods_for

PUBLISHED = ("gemma2_9b", "llama3_8b")
TWO = ("task arithmetic", "LATA linear, block")


def command(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


def silent(_):
    pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Function from a ready configuration, and what its experts start from, to the same over tiny models, and their texts; not to be changed."""
    made = {}

    def of(name="llama3_8b", start="instruct"):
        if (name, start) not in made:
            configuration = replace(read_configuration(name), start=start, methods=TWO, scales=(0.3,), tasks=())
            made[name, start] = tiny_configuration(configuration, tmp_path_factory.mktemp(f"{name}-{start}"), 0)
        return made[name, start]

    return of


@pytest.fixture
def written(tmp_path):
    """Function that writes a configuration file and returns its path."""

    def write(**changes):
        content = {"base": "a/b", "instruct": "a/i", "experts": {"math": {"model": "a/m", "domain": "gsm8k"}}, **changes}
        path = tmp_path / "own.yaml"
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        return path

    return write


# The ready configurations.


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_ready_configuration_runs_end_to_end_on_a_tiny_model_of_its_architecture(name, tmp_path, capsys):
    assert command(name, "--tiny", "--work", tmp_path, "--methods", *TWO, "random linear 1", "--scales", 0.3, 0.75) == 0
    said = capsys.readouterr()
    folder = tmp_path / "real" / f"{name}-tiny"
    results = json.loads((folder / "results.json").read_text())
    assert set(results["reference"]) == {"base", "instruct", "math", "code"}
    assert set(results["reference"]["math"]["test"]) == {"gsm8k", "mbpp", "wikitext2"}
    assert min(results["gains"]["validation"].values()) > 0
    assert set(results["methods"]) == {*TWO, "random linear 1"}
    for row in results["methods"].values():
        assert row["validation"]["0.0"] == 0
        assert set(row["validation"]) == {"0.0", "0.3", "0.75"}
        assert row["scale"] == max((score, -float(scale), float(scale)) for scale, score in row["validation"].items())[2]
        assert row["test"] == row["chosen"][repr(row["scale"])]["kept"]
        assert row["untuned"] == row["chosen"]["1.0"]["kept"]
    assert results["methods"]["task arithmetic"]["test"] > 0.1
    assert list(results["alignment"]["math"]["blocks"]) == [f"model.layers.{index}" for index in range(4)]
    assert set(results["skipped_tasks"]) <= {"gsm8k", "humaneval", "wikitext"}
    assert "--run-code" in results["skipped_tasks"]["humaneval"]
    assert "humaneval is passed over" in said.err
    assert [line.split("|")[1].strip() for line in said.out.splitlines()[2:]] == [*TWO, "random linear 1"]
    assert sorted(path.name for path in folder.iterdir()) == ["models", "moments.json", "results.json", "texts"]


def test_tiny_models_are_of_the_published_architecture(tiny):
    llama, gemma = (AutoModelForCausalLM.from_pretrained(tiny(name)[0].instruct, dtype="auto") for name in ("llama3_8b", "gemma2_9b"))
    assert (llama.config.model_type, gemma.config.model_type) == ("llama", "gemma2")
    assert llama.config.num_attention_heads == 4 * llama.config.num_key_value_heads
    assert gemma.config.num_attention_heads == 2 * gemma.config.num_key_value_heads
    assert llama.lm_head.weight.data_ptr() != llama.model.embed_tokens.weight.data_ptr()
    assert gemma.lm_head.weight.data_ptr() == gemma.model.embed_tokens.weight.data_ptr()
    assert (gemma.config.attn_logit_softcapping, gemma.config.final_logit_softcapping) == (50, 30)
    assert set(gemma.config.layer_types) == {"sliding_attention", "full_attention"}
    assert any("post_feedforward_layernorm" in name for name in gemma.state_dict())
    assert llama.config.rope_parameters["rope_theta"] == 500_000


def test_needs_are_those_of_the_published_parameter_counts():
    llama, gemma = (needs(read_configuration(name)) for name in ("llama3_8b", "gemma2_9b"))
    assert (llama.parameters, gemma.parameters) == (8_030_261_248, 9_241_705_984)
    assert llama.model == 16_060_522_496
    assert llama.disk == 5 * llama.model
    assert gemma.logits == 4096 * 256_000 * (2 + 4 + 4)
    small = replace(read_configuration("llama3_8b"), methods=TWO, scales=(0.5, 1.0))
    assert needs(small).merges == 2 * 4


def test_a_plan_reads_no_weights(capsys):
    assert command("llama3_8b", "--plan", "--expert", "math=somebody/other") == 0
    said = capsys.readouterr().out
    assert "somebody/other" in said
    assert "8,030,261,248" in said
    assert "80.3 GB (4 and one merged, 16.1 GB each)" in said


# Streamed merges.


def test_the_streamed_methods_are_rows_of_the_benchmark():
    assert set(STREAMED) <= set(METHODS)
    assert set(PAPER) <= set(STREAMED)
    assert {name for name in STREAMED if name not in methods_for("instruct")} == {
        "task arithmetic, anchored",
        "task arithmetic on instruct",
    }


@pytest.mark.parametrize(("name", "start"), [("gemma2_9b", "instruct"), ("llama3_8b", "base")])
def test_a_streamed_merge_is_what_the_benchmark_merges_in_memory(name, start, tiny, tmp_path):
    configuration, texts = tiny(name, start)
    run_of = Benchmark(configuration, texts, tmp_path, Options(seed=3), silent)
    weights = {label: load_file(f"{path}/model.safetensors") for label, path in configuration.models.items()}
    experts = tuple(weights[label] for label in configuration.experts)
    case = Case(weights[start], weights["instruct"], weights["base"], experts, 3, (), None, lambda _: 0.0)
    for method in [method for method in STREAMED if method in methods_for(start) and method[-1] not in "345"]:
        target = tmp_path / "one"
        merge(configuration.models[run_of.onto(method)], run_of.terms(method, 0.4), target)
        found, delta = load_file(target / "model.safetensors"), METHODS[method].build(case)
        onto = weights[start if METHODS[method].onto == "start" else "instruct"]
        for tensor, weight in onto.items():
            torch.testing.assert_close(found[tensor], weight + 0.4 * delta[tensor], rtol=1e-5, atol=1e-6, msg=f"{method}: {tensor}")
        for file in target.iterdir():
            file.unlink()
        target.rmdir()


def test_methods_that_need_more_than_coefficients_say_where_to_go():
    with pytest.raises(LataError, match=r"these methods need more: 1: \['TIES 0.2'\]. For TIES and DARE write lata export --to mergekit"):
        check_methods(["task arithmetic", "TIES 0.2"])
    with pytest.raises(LataError, match=r"there are no such methods: 1: \['task aritmetic'\]. Streamed from disk can be task arithmetic, "):
        check_methods(["task aritmetic"])
    with pytest.raises(LataError, match="at least one, got 0"):
        check_methods([])
    with pytest.raises(LataError, match="got 2 with 1 different names"):
        check_methods(["blocks only", "blocks only"])
    with pytest.raises(LataError, match="for experts tuned from instruct these methods are the same as plain task arithmetic"):
        checked(replace(read_configuration("llama3_8b"), methods=("task arithmetic, anchored",)))


def test_experts_with_rows_of_their_own_lose_them(tiny, tmp_path):
    configuration, texts = tiny()
    larger = tmp_path / "larger"
    larger.mkdir()
    weights = load_file(f"{configuration.experts['math'].model}/model.safetensors")
    grown = {
        name: torch.cat([weight, torch.ones(2, weight.shape[1])]) if name in ("model.embed_tokens.weight", "lm_head.weight") else weight
        for name, weight in weights.items()
    }
    save_file(grown, larger / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / configuration.experts["math"].model / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps({**config, "vocab_size": len(grown["lm_head.weight"])}))
    changed = with_models(configuration, None, None, [f"math={larger}"])
    same = Benchmark(configuration, texts, tmp_path / "same", Options(), silent).run()
    found = Benchmark(changed, texts, tmp_path / "grown", Options(), silent).run()
    for method in TWO:
        assert found["methods"][method]["validation_losses"] == same["methods"][method]["validation_losses"]
    with pytest.raises(LataError, match="vocabulary"):
        Benchmark(replace(changed, vocabulary=None), texts, tmp_path / "refused", Options(), silent).run()


# Results that are there already.


@pytest.fixture
def loads(monkeypatch):
    """The paths of the models that were loaded to be scored."""
    found = []

    def counted(path, *rest):
        found.append(path.rpartition("/")[2])
        return open_model(path, *rest)

    monkeypatch.setattr(benchmark_module, "open_model", counted)
    return found


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(tiny, tmp_path, loads):
    configuration, texts = tiny()
    configuration = replace(configuration, methods=TWO[1:])
    whole = Benchmark(configuration, texts, tmp_path / "whole", Options(), silent).run()
    expected = list(loads)
    assert len(expected) == 4 + needs(configuration).merges
    for stop in ("math scored", "alignment of code measured", "LATA linear, block, scale 1 on test"):
        loads.clear()

        def broken(text, stop=stop):
            if text == stop:
                raise KeyboardInterrupt

        folder = tmp_path / stop.replace(" ", "-")
        with pytest.raises(KeyboardInterrupt):
            Benchmark(configuration, texts, folder, Options(), broken).run()
        assert Benchmark(configuration, texts, folder, Options(), silent).run() == whole
        assert loads == expected
        assert json.loads((folder / "results.json").read_text()) == json.loads((tmp_path / "whole" / "results.json").read_text())


def test_what_an_interrupted_merge_leaves_is_removed(tiny, tmp_path):
    configuration, texts = tiny()
    one = replace(configuration, methods=TWO[:1])
    Benchmark(one, texts, tmp_path, Options(), silent).run()
    (tmp_path / "merged" / ".task-arithmetic-0.5.partial-x").mkdir(parents=True)
    Benchmark(one, texts, tmp_path, Options(), silent).run()
    assert not (tmp_path / "merged").exists()


def test_methods_and_scales_can_be_added_to_results_that_are_there(tiny, tmp_path, loads):
    configuration, texts = tiny()
    one = replace(configuration, methods=TWO[:1])
    before = Benchmark(one, texts, tmp_path, Options(), silent).run()
    loads.clear()
    more = Benchmark(
        replace(configuration, scales=(0.3, 0.6), methods=("task arithmetic", "blocks only")), texts, tmp_path, Options(), silent
    ).run()
    assert more["reference"] == before["reference"]
    assert (
        more["methods"]["task arithmetic"]["validation_losses"].items() >= before["methods"]["task arithmetic"]["validation_losses"].items()
    )
    assert loads[0] == "task-arithmetic-0.6"
    assert set(loads) <= {"task-arithmetic-0.6", *(f"blocks-only-{scale}" for scale in (0.3, 0.6, 1.0))}


def test_results_of_something_else_are_refused(tiny, tmp_path):
    configuration, texts = tiny()
    folder = tmp_path / "run"
    Benchmark(replace(configuration, methods=TWO[:1]), texts, folder, Options(), silent).run()
    with pytest.raises(OutputError, match=r"holds results of other settings; 1 differs: \['configuration.chat'\]. Remove its folder"):
        Benchmark(replace(configuration, chat=True), texts, folder, Options(), silent)
    with pytest.raises(OutputError, match=r"\['limit.value', 'seed.value'\]"):
        Benchmark(configuration, texts, folder, Options(limit=2, seed=1), silent)
    (folder / "results.json").write_text("[]")
    with pytest.raises(LataError, match="holds no results"):
        Benchmark(configuration, texts, folder, Options(), silent)
    (folder / "results.json").unlink()
    with pytest.raises(OutputError, match="holds moments.json of results that are gone"):
        Benchmark(configuration, texts, folder, Options(), silent)


def test_kept_models_are_whole_and_stay(tiny, tmp_path):
    configuration, texts = tiny(start="base")
    one = replace(configuration, methods=TWO[:1])
    Benchmark(one, texts, tmp_path, Options(keep=True), silent).run()
    names = ["task-arithmetic-0.3", "task-arithmetic-1.0"]
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == names
    record = json.loads((tmp_path / "merged" / names[0] / "merge.json").read_text())
    assert [(term["start"]["kind"], term["scale"]) for term in record["terms"]] == [("base", 0.3)] * 2
    Benchmark(one, texts, tmp_path, Options(), silent).run()
    assert [verify_merged(tmp_path / "merged" / name) for name in names] == [39, 39]


# Scores.


def test_a_scale_that_destroys_the_model_has_no_score_and_is_not_chosen(tiny, tmp_path):
    configuration, texts = tiny()
    said = []
    found = Benchmark(replace(configuration, methods=TWO[:1], scales=(0.3, 1e42)), texts, tmp_path, Options(), said.append).run()
    row = found["methods"]["task arithmetic"]
    assert row["validation"]["1e+42"] is None
    assert row["scale"] == 0.3
    assert any(line.startswith("task arithmetic at scale 1e+42 has no score: ") for line in said)
    assert summary(found)[1][:2] == ["task arithmetic", "0.3"]


def test_where_no_expert_has_learned_anything_there_is_nothing_to_choose_by(tiny, tmp_path):
    configuration, texts = tiny()
    changed = with_models(configuration, None, None, [f"math={configuration.instruct}", f"code={configuration.instruct}"])
    said = []
    found = Benchmark(replace(changed, methods=TWO[:1]), texts, tmp_path, Options(), said.append).run()
    row = found["methods"]["task arithmetic"]
    assert (row["scale"], row["test"], row["untuned"]) == (None, None, None)
    assert row["chosen"]["1.0"]["test"] == found["reference"]["instruct"]["test"]
    assert sum("no better than instruct does" in line for line in said) == 4
    assert summary(found)[1] == ["task arithmetic", "–", "–", "–", "–"]


def pair_of_experts():
    experts = {"math": Expert("m", "gsm8k"), "code": Expert("c", "mbpp")}
    return replace(read_configuration("llama3_8b"), experts=experts)


def test_kept_is_the_mean_share_of_the_gains():
    reference = {
        "instruct": {"gsm8k": 3.0, "mbpp": 2.0},
        "math": {"gsm8k": 2.0, "mbpp": 9.0},
        "code": {"gsm8k": 9.0, "mbpp": 1.5},
    }
    configuration = pair_of_experts()
    assert gains(reference, configuration) == {"math": 1.0, "code": 0.5}
    assert kept(reference["instruct"], reference, configuration) == 0
    assert kept({"gsm8k": 2.0, "mbpp": 1.5}, reference, configuration) == 1
    assert kept({"gsm8k": 2.5, "mbpp": 2.5}, reference, configuration) == (0.5 - 1.0) / 2
    assert kept({"gsm8k": None, "mbpp": 1.5}, reference, configuration) is None
    worse = {**reference, "code": {"gsm8k": 9.0, "mbpp": 2.5}}
    assert kept({"gsm8k": 2.5, "mbpp": 0.0}, worse, configuration) == 0.5
    broken = {**reference, "math": {"gsm8k": None, "mbpp": 9.0}, "code": {"gsm8k": 9.0, "mbpp": 2.0}}
    assert kept({"gsm8k": 2.5, "mbpp": 1.0}, broken, configuration) is None


class Bigram(torch.nn.Module):
    """A model whose next token depends on the last one only, by a table of logits."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.table[input_ids])


def test_every_token_of_a_text_counts_the_same(tmp_path):
    tokenizer = make_tokenizer()
    for split, text in (("validation", "abcdefgh"), ("test", "hgfedcba" * 3)):
        (tmp_path / split).mkdir()
        (tmp_path / split / "one.txt").write_text(text)
    model = Bigram(torch.zeros(len(tokenizer), len(tokenizer)))
    held_out = HeldOut(tokenizer, tmp_path, ["one"], 8)
    assert held_out(model, "test") == {"one": pytest.approx(math.log(len(tokenizer)), rel=1e-6)}


def test_answers_are_scored_alone(tmp_path):
    tokenizer = make_tokenizer()
    for split, answer in (("validation", "xy"), ("test", "xyz")):
        (tmp_path / split).mkdir()
        (tmp_path / split / "gsm8k.jsonl").write_text(json.dumps({"question": "ab", "answer": answer}) + "\n")
    model = Bigram(torch.zeros(len(tokenizer), len(tokenizer)))
    held_out = HeldOut(tokenizer, tmp_path, ["gsm8k"], 16)
    assert held_out(model, "test") == {"gsm8k": pytest.approx(math.log(len(tokenizer)), rel=1e-6)}
    with torch.no_grad():
        model.table[:] = torch.nan
    assert held_out(model, "test") == {"gsm8k": None}


def test_held_out_texts_must_be_there_and_differ(tmp_path):
    for split in ("validation", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "one.txt").write_text("the same text")
    with pytest.raises(LataError, match=r"the texts must differ; the same are 1: \['one'\]"):
        text_files(tmp_path, ["one"])
    with pytest.raises(SourceError, match=r"there are no held-out texts 2: \[.*test/two.jsonl', .*validation/two.jsonl'\]"):
        text_files(tmp_path, ["two"])


def test_texts_are_made_from_the_held_out_parts_of_published_data_sets(tmp_path):
    data = tmp_path / "data"
    for name in ("gsm8k", "mbpp", "wikitext2"):
        (data / name).mkdir(parents=True)

    def rows(count, prompt, answer, mark):
        return "".join(json.dumps({prompt: f"{mark}{number}", answer: f"a\r\n{number}"}) + "\n" for number in range(1, count + 1))

    (data / "gsm8k" / "train.jsonl").write_text(rows(302, "question", "answer", "train"))
    (data / "gsm8k" / "test.jsonl").write_text(rows(2, "question", "answer", "test"))
    (data / "mbpp" / "mbpp.jsonl").write_text(rows(974, "text", "code", "task"))
    (data / "wikitext2" / "valid.txt").write_text("v" * 100_001)
    (data / "wikitext2" / "test.txt").write_text("t")
    configuration = read_configuration("llama3_8b")
    folder = made_texts(configuration, data, tmp_path / "run")

    def prompts(split, name):
        return [json.loads(line)["prompt"] for line in (folder / split / f"{name}.jsonl").read_text().splitlines()]

    assert prompts("validation", "gsm8k") == [f"train{number}" for number in range(3, 303)]
    assert prompts("test", "gsm8k") == ["test1", "test2"]
    assert json.loads((folder / "test" / "gsm8k.jsonl").read_text().splitlines()[0])["answer"] == "a\n1"
    assert prompts("validation", "mbpp") == [f"task{number}" for number in range(511, 601)]
    assert prompts("test", "mbpp") == [f"task{number}" for number in range(11, 511)]
    assert (folder / "validation" / "wikitext2.txt").read_text() == "v" * 100_000
    assert made_texts(configuration, None, tmp_path / "run") == folder
    with pytest.raises(SourceError, match=r"nowhere is no folder of data sets \(--data, or LATA_DATA\)"):
        made_texts(configuration, "nowhere", tmp_path / "other")
    with pytest.raises(
        LataError, match=r"there are no held-out texts for 1: \['poems'\]: give their folder with --texts, a data set for each"
    ):
        made_texts(replace(configuration, kept=("poems",)), data, tmp_path / "other")
    (data / "mbpp" / "mbpp.jsonl").write_text('{"text": "only"}\n')
    with pytest.raises(LataError, match=r"must have 'text' and 'code'; others are 1: \['line 1'\]"):
        made_texts(configuration, data, tmp_path / "other")
    (data / "mbpp" / "mbpp.jsonl").unlink()
    with pytest.raises(SourceError, match=r"mbpp.jsonl cannot be read: No such file"):
        made_texts(configuration, data, tmp_path / "other")
    assert not (tmp_path / "other" / "texts").exists()


def test_texts_are_made_from_data_sets_that_the_configuration_names(tmp_path, written):
    for name, rows in (
        ("sums", {split: [{"q": f"{split}{number}", "a": f"a\r\n{number}"} for number in range(5)] for split in ("train", "test")}),
        ("poems", {split: [{"line": line} for line in ("", f"In {split}\n", "no end")] for split in ("validation", "test")}),
    ):
        (tmp_path / name).mkdir()
        for split, content in rows.items():
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    sums = {"dataset": str(tmp_path / "sums"), "validation": "train[-2:]", "test": "test", "prompt": "q", "answer": "a"}
    poems = {"dataset": str(tmp_path / "poems"), "validation": "validation", "test": "test", "text": "line"}
    configuration = read_configuration(written(kept=["poems"], texts={"gsm8k": sums, "poems": poems}))
    folder = made_texts(configuration, None, tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "validation" / "gsm8k.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": "train3", "answer": "a\n3"}, {"prompt": "train4", "answer": "a\n4"}]
    assert (folder / "test" / "poems.txt").read_text() == "\nIn test\nno end\n"
    assert configuration.identity() == replace(configuration, texts={}).identity()
    for changes, said in (
        ({"answer": "solution"}, r"the data has no column 'solution'; its columns are 'q', 'a'"),
        ({"test": "held-out"}, r"cannot read split 'held-out'"),
    ):
        broken = read_configuration(written(texts={"gsm8k": sums | changes}))
        with pytest.raises(LataError, match=said):
            made_texts(broken, None, tmp_path / "other")
        assert not (tmp_path / "other" / "texts").exists()


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"gsm8k": "openai/gsm8k"}, r"must give under 'texts' keys and values for each name of a text"),
        (
            {"gsm8k": {"dataset": "a/b", "test": "test", "text": "t"}},
            r"for the text 'gsm8k' dataset, test, validation, may give .*and gives dataset, test, text",
        ),
        (
            {"gsm8k": {"dataset": "a/b", "validation": "v", "test": "t", "text": "t", "path": "p"}},
            r"and gives dataset, path, test, text, validation",
        ),
        (
            {"gsm8k": {"dataset": "a/b", "validation": "v", "test": "t", "prompt": "p"}},
            r"either the column 'text', or the columns 'prompt' and 'answer'",
        ),
        ({"gsm8k": {"dataset": "a/b", "validation": "v", "test": "t"}}, r"either the column 'text', or the columns 'prompt' and 'answer'"),
    ],
)
def test_data_sets_that_are_not_described_in_full_are_refused(written, texts, said):
    with pytest.raises(LataError, match=said):
        read_configuration(written(texts=texts))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_ready_configuration_names_a_data_set_for_each_of_its_texts(name):
    configuration = read_configuration(name)
    assert set(configuration.texts) == set(configuration.domains)


# Tasks of the harness.


@pytest.fixture
def harness(monkeypatch):
    """What the harness was asked; it knows two tasks and runs no code unless told."""
    asked = []

    def evaluate(model, tokenizer, tasks, *, limit, chat, run_code=False):
        asked.append((*tasks, limit, chat, run_code))
        if tasks[0] == "offline":
            raise SourceError("the data of a task cannot be had")
        return {tasks[0]: {"exact_match": 0.25, "exact_match_stderr": math.nan}}

    monkeypatch.setattr(scoring, "evaluate_tasks", evaluate)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    return asked


def test_tasks_that_cannot_be_run_are_passed_over_with_the_reason(harness):
    configuration = read_configuration("llama3_8b")
    found, skipped = score_tasks(None, None, ["gsm8k", "offline", "humaneval"], configuration, limit=3, run_code=False)
    assert found == {"gsm8k": {"gsm8k/exact_match": 0.25}}
    assert skipped["offline"] == "the data of a task cannot be had"
    assert "--run-code allows it" in skipped["humaneval"]
    assert harness == [("gsm8k", 3, False, False), ("offline", 3, False, False)]
    assert "humaneval" in score_tasks(None, None, ["humaneval"], replace(configuration, chat=True), limit=None, run_code=True)[0]
    assert harness[-1] == ("humaneval", None, True, True)


def test_tasks_are_run_on_the_models_as_they_are_and_at_the_scales_that_are_judged(tiny, tmp_path, harness, loads):
    configuration, texts = tiny()
    with_tasks = replace(configuration, methods=TWO[:1], scales=(0.3, 0.6), tasks=("gsm8k", "offline"))
    first = Benchmark(with_tasks, texts, tmp_path, Options(), silent).run()
    assert first["skipped_tasks"] == {"offline": "the data of a task cannot be had"}
    assert all(row["tasks"] == {"gsm8k": {"gsm8k/exact_match": 0.25}} for row in first["reference"].values())
    judged = first["methods"]["task arithmetic"]["chosen"]
    assert all(row["tasks"] == {"gsm8k": {"gsm8k/exact_match": 0.25}} for row in judged.values())
    assert [entry[0] for entry in harness].count("gsm8k") == 4 + len(judged)
    assert [entry[0] for entry in harness].count("offline") == 1
    assert summary(first)[0][-1] == "gsm8k/exact_match"
    assert summary(first)[1][-1] == "0.25"
    losses = {scale: row["test"] for scale, row in judged.items()}
    loads.clear()
    harness.clear()
    more = Benchmark(replace(with_tasks, tasks=("gsm8k", "humaneval")), texts, tmp_path, Options(run_code=True), silent).run()
    assert {entry[0] for entry in harness} == {"humaneval"}
    assert len(loads) == 4 + len(judged)
    assert {scale: row["test"] for scale, row in more["methods"]["task arithmetic"]["chosen"].items()} == losses


# Refusals.


def test_a_configuration_with_wrong_keys_is_refused_in_one_line(written, tmp_path):
    assert read_configuration(written()).experts == {"math": Expert("a/m", "gsm8k")}
    cases = [
        ({"expert": {}}, r"has unknown keys, 1: \['expert'\]; known are architecture, base, chat, "),
        ({"base": None}, r"lacks keys that every configuration needs, 1: \['base'\]"),
        ({"experts": {"math": "a/m"}}, "must give under 'experts' a name for each, and for each name the keys model, domain"),
        ({"experts": {"base": {"model": "a", "domain": "d"}}}, "which is the name of another model"),
        ({"experts": {"../x": {"model": "a", "domain": "d"}}}, r"become file names, .* others are 1: \['../x'\]"),
        ({"instruct": 3}, "the key 'instruct' of a configuration must be a text, it is 3"),
        ({"methods": "LATA"}, "the key 'methods' of a configuration must be a list of names, it is 'LATA'"),
        ({"scales": []}, r"the key 'scales' of a configuration must be a list of numbers, it is \[\]"),
        ({"scales": ["1"]}, "the key 'scales' of a configuration must be a list of numbers"),
        ({"chat": "yes"}, "the key 'chat' of a configuration must be true or false"),
        ({"context_length": 1}, "the key 'context_length' of a configuration must be a whole number from 2 on, it is 1"),
        ({"vocabulary": "union"}, "the key 'vocabulary' of a configuration must be 'onto' or left out, it is 'union'"),
        ({"architecture": {"layers": 3}}, "the key 'architecture' of a configuration must be a transformers configuration"),
        ({"start": "expert"}, "expert"),
        ({"dtype": "int8"}, "int8"),
    ]
    for changes, message in cases:
        with pytest.raises(LataError, match=message) as caught:
            read_configuration(written(**changes))
        assert "\n" not in str(caught.value)
    with pytest.raises(SourceError, match="no configuration file .* and none of the ready ones: gemma2_9b, llama3_8b"):
        read_configuration("llama4")
    odd = tmp_path / "odd.yaml"
    odd.write_text("base: [")
    with pytest.raises(LataError, match="is no YAML"):
        read_configuration(odd)
    odd.write_text("- base")
    with pytest.raises(LataError, match="must hold keys and values, it holds a list"):
        read_configuration(odd)


def test_another_model_can_stand_in_for_any_of_the_configuration():
    configuration = read_configuration("llama3_8b")
    changed = with_models(configuration, "./base", None, ["code=./code"])
    assert changed.models == {**configuration.models, "base": "./base", "code": "./code"}
    assert changed.experts["code"].domain == "mbpp"
    for wrong in ("code", "code=", "maths=x"):
        with pytest.raises(LataError, match=f"--expert takes NAME=MODEL with one of math, code, got '{wrong}'"):
            with_models(configuration, None, None, [wrong])


def test_without_an_architecture_there_is_nothing_tiny_to_make(written, tmp_path):
    with pytest.raises(LataError, match="the configuration own says nothing of the architecture; give it the key 'architecture'"):
        command(written(), "--tiny", "--work", tmp_path)
    with pytest.raises(LataError, match="transformers has no such architecture as that of own"):
        empty_model(read_configuration(written(architecture={"model_type": "no_such_model"})))


def test_tiny_models_take_no_others_beside_them(tmp_path):
    with pytest.raises(LataError, match="--tiny makes its own models: leave out --base"):
        command("llama3_8b", "--tiny", "--expert", "math=./mine", "--work", tmp_path)


def test_models_that_cannot_be_had_are_named_before_any_work(tiny, tmp_path):
    _, texts = tiny()
    with pytest.raises(SourceError, match=r"meta-llama/Meta-Llama-3-8B .*could not be downloaded .*offline, give a directory"):
        command("llama3_8b", "--texts", texts, "--work", tmp_path)
    assert not list(tmp_path.rglob("results.json"))


def test_a_device_that_is_not_there_is_refused(tiny):
    with pytest.raises(SourceError, match="the model cannot be put on the device 'nowhere'"):
        open_model(tiny()[0].instruct, "float32", "nowhere")


def test_tiny_models_of_a_configuration_load_as_any_other(tiny):
    configuration, _ = tiny("gemma2_9b")
    assert AutoConfig.from_pretrained(configuration.base).num_hidden_layers == 4
