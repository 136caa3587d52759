"""Models of equal shapes and another meaning are refused, by every entry and in every form in which they come."""

import json
import shutil

import pytest
import torch
from tiny_models import leftovers, llama, read_back
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lata_lightning.cli.main import main
from lata_lightning.errors import CorruptFileError, LayoutMismatchError
from lata_lightning.exports import export_to
from lata_lightning.linearity.regression import regress
from lata_lightning.linearity.solving import solve_coefficients
from lata_lightning.merging.merge import Term, forget, merge
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.artefact import verify
from lata_lightning.vectors.projection import project
from lata_lightning.vectors.task_vector import TaskVector

WORDS = [f"w{row}" for row in range(20)]
BATCH = [{"input_ids": torch.arange(6).reshape(1, 6)}]
OTHER_CONFIGS = {
    "rope_theta": {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    "num_attention_heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2},
    "hidden_act": {"hidden_act": "gelu"},
    "rms_norm_eps": {"rms_norm_eps": 1e-3},
}


def save(directory, seed, words=WORDS, **change):
    llama(seed).save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if words is not None:
        inner = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}))
        PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Four models of one kind; like tuned, with another theta, spare rows taken or tokens in another order; and vectors of each from a start like it."""
    folder = tmp_path_factory.mktemp("meaning")
    for seed, name in enumerate(("base", "instruct", "tuned", "onto")):
        save(folder / name, seed)
    for name, words, change in (
        ("theta", WORDS, OTHER_CONFIGS["rope_theta"]),
        ("spare", [*WORDS, "<call>"], {}),
        ("permuted", WORDS[::-1], {}),
    ):
        for seed, side in ((1, "start"), (2, "tuned")):
            save(folder / f"{name}-{side}", seed, words, **change)
        TaskVector.between(folder / f"{name}-start", folder / f"{name}-tuned").save(folder / f"{name}-vector")
    TaskVector.between(folder / "instruct", folder / "tuned").save(folder / "vector")
    TaskVector.between(folder / "base", folder / "instruct", kind="instruction").save(folder / "instruction")
    return folder


SAID = {
    "theta": r"same function of their weights; their configs differ in 1 keys that change it: rope_parameters.rope_theta is",
    "spare": r"must have the same tokens; 1 are on one side only, although both may have rows for them, first: 20 is '<call>'.*--vocabulary",
    "permuted": r"must have the same token at the same row; 20 rows differ, first: 0 is",
}


@pytest.mark.parametrize("change", OTHER_CONFIGS)
@pytest.mark.parametrize("words", [WORDS, None])
def test_sides_whose_configs_compute_another_function_are_refused_and_both_values_named(tmp_path, change, words):
    one, other = save(tmp_path / "one", 0, words), save(tmp_path / "other", 1, words, **OTHER_CONFIGS[change])
    with pytest.raises(
        LayoutMismatchError, match=rf"their configs differ in \d keys that change it: .*{change} is .* and .*--check-config false"
    ):
        TaskVector.between(one, other)
    assert len(TaskVector.between(one, other, check_config=False)) == 21


@pytest.mark.parametrize("kind", SAID)
def test_both_sides_of_a_difference_are_compared(made, kind):
    with pytest.raises(LayoutMismatchError, match=SAID[kind]):
        TaskVector.between(made / "instruct", made / f"{kind}-tuned")


@pytest.mark.parametrize("kind", SAID)
def test_a_saved_vector_is_compared_with_whatever_it_is_used_with(made, tmp_path, kind):
    vector, instruction, onto = TaskVector.open(made / f"{kind}-vector"), TaskVector.open(made / "instruction"), made / "onto"
    samples = [BATCH]
    for number, use in enumerate(
        (
            lambda output: merge(onto, [Term(vector)], output),
            lambda output: merge(onto, [Term(TaskVector.open(made / "vector")), Term(vector)], output, check_base=False),
            lambda output: forget(onto, Term(vector), output),
            lambda output: export_to("hf", [Term(vector)], output, onto=onto, check_base=False),
            lambda output: export_to("peft", [Term(vector)], output, onto=onto, check_base=False),
            lambda output: export_to("mergekit", [Term(vector)], output, onto=onto, check_base=False),
            lambda output: solve_coefficients(str(onto), [vector], samples),
            lambda output: regress([vector, vector], start=str(onto), samples=[BATCH, BATCH]),
            lambda output: align(vector, instruction, check_base=False),
            lambda output: project(vector, instruction, check_base=False),
        )
    ):
        with pytest.raises(LayoutMismatchError, match=SAID[kind]):
            use(tmp_path / str(number))
    assert leftovers(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", SAID)
def test_two_saved_vectors_are_compared_where_the_model_is_not_known(made, tmp_path, kind):
    vectors = [TaskVector.open(made / name) for name in ("vector", f"{kind}-vector")]
    with pytest.raises(LayoutMismatchError, match=SAID[kind]):
        merge(read_back(made / "onto"), [Term(vector) for vector in vectors], tmp_path / "out", check_base=False)


def test_without_the_comparison_of_configs_the_vector_is_used_as_it_is(made, tmp_path):
    vector = TaskVector.open(made / "theta-vector", check_config=False)
    merge(made / "onto", [Term(vector)], tmp_path / "out")
    start, one, other = (read_back(made / name) for name in ("onto", "theta-start", "theta-tuned"))
    merged = read_back(tmp_path / "out")
    for name, tensor in start.items():
        torch.testing.assert_close(merged[name], tensor + other[name] - one[name])
    # What is saved still knows its config.
    again = vector.save(tmp_path / "again")
    assert again.manifest.meaning.config["rope_parameters"]["rope_theta"] == 1e6


@pytest.mark.parametrize(
    "line",
    [
        "extract instruct {kind}-tuned --output out",
        "merge onto {kind}-vector --output out",
        "merge onto {kind}-tuned --output out",
        "forget onto {kind}-vector --output out",
        "align {kind}-vector --instruction instruction --check-base false",
        "project {kind}-vector --instruction instruction --check-base false --output out",
        "export {kind}-vector --to hf --onto onto --check-base false --output out",
    ],
)
@pytest.mark.parametrize("kind", SAID)
def test_every_command_refuses_in_one_line_and_writes_nothing(made, monkeypatch, capsys, tmp_path, line, kind):
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    assert main(line.format(kind=kind).split()) == 1
    said = capsys.readouterr().err
    assert said.startswith("lata: error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    if kind == "theta":
        assert main([*line.format(kind=kind).split(), "--check-config", "false"]) == 0


def test_tokens_that_only_the_model_has_stay_as_they_are_where_a_choice_of_rows_was_asked_for(made, tmp_path):
    onto = save(tmp_path / "onto", 5, [*WORDS, "<own>"])
    vector = TaskVector.open(made / "vector")
    with pytest.raises(LayoutMismatchError, match="20 is '<own>'"):
        merge(onto, [Term(vector)], tmp_path / "out")
    merge(onto, [Term(vector)], tmp_path / "out", vocabulary="onto")
    before, after = read_back(onto), read_back(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(before[name][20], after[name][20])
        assert not torch.equal(before[name][:20], after[name][:20])
        torch.testing.assert_close(after[name][21:], (before[name] + vector[name])[21:])


def test_tokens_in_another_order_are_refused_even_where_a_choice_of_rows_was_asked_for(made, tmp_path):
    for vocabulary in ("onto", "union"):
        with pytest.raises(LayoutMismatchError, match="same token at the same row"):
            merge(made / "onto", [Term(TaskVector.open(made / "permuted-vector"))], tmp_path / "out", vocabulary=vocabulary)


def test_a_vector_of_an_older_version_passes_as_unknown(made, tmp_path):
    shutil.copytree(made / "theta-vector", tmp_path / "old")
    path = tmp_path / "old/task_vector.json"
    data = json.loads(path.read_text())
    for key in ("model", "self_hash"):
        del data[key]
    path.write_text(json.dumps({**data, "format_version": 2}))
    assert verify(tmp_path / "old") == 21
    merge(made / "onto", [Term(TaskVector.open(tmp_path / "old"))], tmp_path / "out")


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data.update(coefficients=dict.fromkeys(data["blocks"], 0.5)),
        lambda data: data["tensors"]["model.norm.weight"].update(block="model.layers.0", part="norm"),
        lambda data: data.update(outside=0.5),
        lambda data: data["model"].update(config=None),
    ],
)
def test_verify_notices_an_edited_manifest(made, tmp_path, edit):
    shutil.copytree(made / "vector", tmp_path / "vector")
    path = tmp_path / "vector/task_vector.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data, indent=2) + "\n")
    with pytest.raises(CorruptFileError, match="task_vector.json was edited after it was written"):
        verify(tmp_path / "vector")
    # Opening does not ask: what was edited on purpose stays usable.
    TaskVector.open(tmp_path / "vector")
