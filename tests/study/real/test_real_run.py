"""The whole study on tiny models: every part, its page, resuming where it stopped, and the numbers against transformers and torch."""

import argparse
import json
import shutil
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM

from lata_lightning.errors import LataError
from lata_lightning.merging.merge import Term, merge
from lata_lightning.rows.tokens import conversation_row
from lata_lightning.vectors.task_vector import TaskVector
from study.real import command as command_module
from study.real import record as record_module
from study.real import tuning
from study.real.command import PARTS, add_arguments, run
from study.real.configuration import Tuning, read_configuration
from study.real.forgetting import Facts
from study.real.page import write
from study.real.scoring import first_tokens
from study.real.tiny import tiny_configuration
from study.real.tuning import FineTunes

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
PAIR = ("gsm8k", "mbpp")


def command(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(["smollm2_135m", *map(str, arguments)]))


def comparable(result):
    """A result without what depends on the clock and on where the models lie."""
    return {key: value for key, value in result.items() if key not in ("minutes", "model")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a finished run of every part of one seed; not to be changed."""
    work = tmp_path_factory.mktemp("real")
    assert command("--tiny", "--seeds", 0, "--work", work) == 0
    return work / "real" / "smollm2_135m-tiny"


@pytest.fixture(scope="module")
def results(finished):
    return {path.name: json.loads(path.read_text()) for path in (finished / "results").glob("*.json")}


@pytest.fixture
def models(finished):
    """The fine-tunes of the finished run."""
    configuration, data = tiny_configuration(read_configuration("smollm2_135m"), finished)
    return FineTunes(configuration, finished, 0, data, lambda text: None)


@pytest.fixture
def copied(finished, tmp_path):
    """Function that copies what some parts of the finished run have left, without their results, and returns the folder of all runs."""

    def copy(*left_out):
        shutil.copytree(finished, tmp_path / "real" / finished.name, ignore=shutil.ignore_patterns("results", *left_out))
        return tmp_path

    return copy


def test_every_part_leaves_a_result(results):
    assert {result["part"] for result in results.values()} == set(PARTS)
    merging = {name: result for name, result in results.items() if result["part"] == "merging"}
    assert len(merging) == 4
    assert {(result["setting"]["protocol"], result["setting"]["adapters"]) for result in merging.values()} == {
        ("plain", False),
        ("plain", True),
        ("instruct", False),
        ("base", False),
    }
    assert all(result["configuration"] == "smollm2_135m" and "torch" in result["versions"] for result in results.values())


def test_a_loss_is_that_of_a_merge_that_transformers_loads(finished, models, results, tmp_path):
    vectors = [models.expert(name, "plain").vector() for name in PAIR]
    merged = merge(models.model, [Term(vector) for vector in vectors], tmp_path / "merged", check_base=False)
    model = AutoModelForCausalLM.from_pretrained(merged).eval()
    losses, count = 0.0, 0
    for sample in first_tokens(models.rows("gsm8k").test, models.tokenizer, models.configuration.held_out["test"]):
        row = conversation_row(models.tokenizer, sample, "a row")
        with torch.no_grad():
            logits = model(row.input_ids[None]).logits[0, :-1]
        wanted = row.labels[1:]
        learned = wanted != -100
        losses += float(torch.nn.functional.cross_entropy(logits[learned], wanted[learned], reduction="sum"))
        count += int(learned.sum())
    recorded = results["merging-seed-0-plain-gsm8k+mbpp.json"]["methods"]["task arithmetic"]["untuned_details"]["gsm8k"]["loss"]
    assert recorded == pytest.approx(losses / count, rel=1e-4)


def test_the_score_of_a_row_is_the_mean_share_of_the_gains_it_keeps(results):
    result = results["merging-seed-0-instruct-gsm8k+mbpp.json"]
    start, experts = result["reference"]["start"], result["reference"]["experts"]
    row = result["methods"]["TSV-M"]
    shares = [
        (start[name]["loss"] - row["test_details"][name]["loss"]) / (start[name]["loss"] - experts[name][name]["loss"]) for name in PAIR
    ]
    assert row["test"] == pytest.approx(fmean(shares))
    assert list(row["test_kept"].values()) == pytest.approx(shares)


def test_the_scale_of_a_row_is_the_best_on_validation(results):
    for result in results.values():
        for row in result["methods"].values() if result["part"] == "merging" else ():
            best = max(row["validation"].values())
            assert row["validation"][f"{row['scale']:g}"] == best


def test_experts_from_the_model_are_the_same_under_both_protocols(models):
    assert models.expert("gsm8k", "plain") == models.expert("gsm8k", "base")
    assert models.expert("gsm8k", "plain").vector("base").start == "base"


def test_the_callback_saw_every_fine_tune_as_often_as_asked_for(models):
    run = models.expert("gsm8k", "plain")
    steps = [row["step"] for row in run.history]
    assert steps == list(range(1, models.configuration.experts["gsm8k"].steps + 1))
    assert all("alignment" in row for row in run.history)


def test_an_adapter_is_kept_in_its_factors(models):
    vector = models.expert("gsm8k", "plain", adapters=True).vector()
    adapted = [name for name in vector if name not in vector.unchanged]
    assert adapted
    assert all(vector.low_rank(name).rank <= models.configuration.adapters.rank for name in adapted)


def test_the_stages_of_a_sequence_begin_where_the_one_before_ended(results):
    result = next(result for result in results.values() if result["part"] == "continual")
    matrix = result["methods"]["sequential fine-tuning"]["matrix"]
    # The first stage is the expert itself.
    assert matrix[0][0] == pytest.approx(1.0, abs=1e-4)
    assert matrix[1][1] > matrix[0][1]


def test_after_one_data_set_a_merge_is_the_expert(results):
    result = next(result for result in results.values() if result["part"] == "continual")
    for name in ("task arithmetic", "lata regress without samples", "TSV-M"):
        assert result["methods"][name]["matrix"][0][0] == pytest.approx(1.0, abs=0.05)


def test_a_removal_stops_where_no_more_is_remembered_than_by_the_retrained_model(results):
    result = next(result for result in results.values() if result["part"] == "forgetting")
    wanted = result["references"]["retrained"]["probability"]
    assert result["references"]["target"]["probability"] > wanted
    assert result["references"]["retrained"]["forget_quality"] == pytest.approx(1.0)
    reached = [row for case in result["cases"].values() for row in case["methods"].values() if row["scale"] is not None]
    assert reached
    assert all(row["measured"]["probability"] <= wanted * (1 + 1e-5) for row in reached)
    assert "exact subtraction" in result["cases"]["start at base"]["methods"]


def test_wrong_answers_are_those_to_the_same_question_about_other_authors(models):
    facts = Facts(models)
    rows = [json.loads(line) for line in facts.files["forgotten"].read_text().splitlines()]
    assert len(rows) == 20
    for number, row in enumerate(rows):
        assert row["answer"] not in row["perturbed_answer"]
        others = {author[number].answer for author in facts.by_author[1:]}
        assert set(row["perturbed_answer"]) == others


def test_encoders_learn_with_heads_of_different_sizes(results):
    result = next(result for result in results.values() if result["part"] == "encoders")
    assert result["tasks"] == {"clinc150": 4, "banking77": 3}
    full = result["trainings"]["full"]
    assert all(full["single"]["test"][name] > full["start"][name] for name in result["tasks"])
    grid = full["disentanglement"]["scales"]
    # Where neither vector acts, nothing can differ.
    assert full["disentanglement"]["prediction"]["error"][grid.index(0.0)][grid.index(0.0)] == 0


def test_attention_only_moves_nothing_but_attention(finished):
    vector = TaskVector.open(finished / "seed-0" / "runs" / "encoder-clinc150-attention-only" / "task_vector")
    moved = {name for name in vector if name not in vector.unchanged and vector[name].any()}
    assert moved
    assert all("attention" in name for name in moved)


# Resuming.


def test_finished_results_are_left_alone(finished, monkeypatch):
    monkeypatch.setattr(command_module, "_tell", lambda *given: pytest.fail("written again"))
    before = {path: path.read_bytes() for path in (finished / "results").glob("*.json")}
    assert command("--tiny", "--seeds", 0, "--work", finished.parent.parent) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_results_that_are_gone_come_back_the_same_without_training_or_scoring(copied, results, monkeypatch):
    work = copied()
    monkeypatch.setattr(tuning, "train", lambda *given: pytest.fail("trained again"))
    assert command("--tiny", "--seeds", 0, "--work", work, "--part", "prediction") == 0
    again = json.loads((work / "real/smollm2_135m-tiny/results/prediction-seed-0.json").read_text())
    assert comparable(again) == comparable(results["prediction-seed-0.json"])


@pytest.mark.parametrize("writes", [0, 3, 7])
def test_a_run_that_is_broken_off_goes_on_to_the_same_result(copied, results, monkeypatch, writes):
    work, name = copied("record-merging.json"), "plain-gsm8k+mbpp"
    methods = ("task arithmetic", "DARE 0.5", "lata regress")
    arguments = ("--tiny", "--seeds", 0, "--work", work, "--part", "merging", "--settings", name, "--methods", *methods)
    left = iter(range(writes))

    def breaking(path, data, write=record_module.replace_json):
        if path.name == "record-merging.json" and next(left, None) is None:
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(record_module, "replace_json", breaking)
        with pytest.raises(KeyboardInterrupt):
            command(*arguments)
    assert command(*arguments) == 0
    again = json.loads((work / f"real/smollm2_135m-tiny/results/merging-seed-0-{name}.json").read_text())["methods"]
    assert again == {method: results[f"merging-seed-0-{name}.json"]["methods"][method] for method in again}
    assert not (work / "real/smollm2_135m-tiny/seed-0/scratch").exists()


def test_a_fine_tune_that_is_broken_off_begins_anew_and_ends_the_same(models, tmp_path, monkeypatch):
    other = FineTunes(models.configuration, tmp_path, 0, models.data, lambda text: None)
    before = models.expert("mbpp", "plain")

    def breaking(module, batches, steps, callbacks, precision, train=tuning.train):
        train(module, batches, steps // 2, callbacks, precision)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "train", breaking)
        with pytest.raises(KeyboardInterrupt):
            other.expert("mbpp", "plain")
    after = other.expert("mbpp", "plain")
    assert after.digest == before.digest
    assert all(torch.equal(after.vector()[name], before.vector()[name]) for name in before.vector())


def test_a_fine_tune_under_other_settings_takes_the_place_of_the_old_one(models, tmp_path):
    few = models.rows("mbpp").train[:8]
    tunes = FineTunes(models.configuration, tmp_path, 0, models.data, lambda text: None)
    one = tunes.tuned("try", tunes.model, few, Tuning(2, 1e-3))
    assert tunes.tuned("try", tunes.model, few, Tuning(2, 1e-3)) == one
    other = tunes.tuned("try", tunes.model, few, Tuning(2, 2e-3))
    assert other.folder == one.folder
    assert other.digest != one.digest


def test_vectors_may_be_removed_once_results_are_written(copied):
    work = copied()
    assert command("--tiny", "--seeds", 0, "--work", work, "--part", "prediction", "--remove-vectors") == 0
    assert not (work / "real/smollm2_135m-tiny/seed-0").exists()
    assert (work / "real/smollm2_135m-tiny/results/prediction-seed-0.json").exists()


# Page, plan, refusals.


def test_the_page_has_every_part_with_its_command_and_figures(finished, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(finished / "results", folder)
    text = write(folder)
    for part in PARTS:
        assert f"`python -m study real smollm2_135m --part {part} --seeds 0`" in text
    linked = {line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert len(linked) == 8
    assert all((tmp_path / name).is_file() for name in linked)
    assert (tmp_path / "mine.md").read_text() == text
    assert text == write(folder)
    assert "nan" not in text


def test_a_page_of_nothing_says_how_to_begin(tmp_path):
    (tmp_path / "none").mkdir()
    assert "No results yet: run `python -m study real smollm2_135m`" in write(tmp_path / "none")


def test_results_of_two_models_make_no_page(finished, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(finished / "results", folder)
    result = json.loads((folder / "continual-seed-0.json").read_text())
    (folder / "continual-seed-1.json").write_text(json.dumps(result | {"model": "another"}))
    with pytest.raises(LataError, match="a page is about one model, and .* holds results of 2"):
        write(folder)


def test_a_seed_without_the_random_rows_is_shown_without_a_verdict(finished, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    result = json.loads((finished / "results" / "merging-seed-0-plain-gsm8k+mbpp.json").read_text())
    few = {name: row for name, row in result["methods"].items() if not name.startswith("random")}
    (folder / "a.json").write_text(json.dumps(result | {"methods": few}))
    assert "| random ranks" not in write(folder)


def test_the_plan_says_what_every_part_takes_and_reads_nothing(capsys, monkeypatch):
    monkeypatch.delenv("LATA_DATA", raising=False)
    assert command("--plan", "--seeds", 0, 1, 2) == 0
    said = capsys.readouterr().out
    assert all(line.split()[0] in PARTS for line in said.splitlines()[1:6])
    assert "hours for 3" in said
    assert "GB for 3" in said


def test_without_data_nothing_begins(tmp_path, monkeypatch):
    monkeypatch.delenv("LATA_DATA", raising=False)
    with pytest.raises(LataError, match="LATA_DATA .or --data. must name the folder of the data sets"):
        command("--work", tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_setting_is_refused_with_the_choices(finished):
    with pytest.raises(LataError, match=r"unknown settings are 1: \['other'\]; the settings are base-"):
        command("--tiny", "--work", finished.parent.parent, "--settings", "other")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tiny", "--model", "x", "--results", "y"), "--tiny makes its own models"),
        (("--model", "x"), "results of another model need a folder of their own: give --results"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, arguments, said):
    with pytest.raises(LataError, match=said):
        command("--work", tmp_path, *arguments)


def test_models_are_made_alone_without_data(finished, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("LATA_DATA", raising=False)
    decoder, encoder = (finished / "tiny-models" / name for name in ("decoder", "encoder"))
    arguments = ("--model", decoder, "--encoder", encoder, "--results", tmp_path, "--work", tmp_path)
    assert command("--make-models", *arguments) == 0
    assert capsys.readouterr().out.splitlines() == [str(decoder), str(encoder)]


def test_without_rows_nothing_is_trained(models):
    long = replace(models.configuration, context_length=8)
    with pytest.raises(LataError, match="no rows to train on; are all of them longer than context_length"):
        FineTunes(long, models.work, 0, models.data, lambda text: None).batches([], 1, 0)
