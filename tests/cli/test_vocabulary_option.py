"""``--vocabulary`` of ``lata extract``, ``merge`` and ``forget``."""

import json

import pytest
import torch
from tiny_models import llama, read_back
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lata_lightning.cli.main import main
from lata_lightning.merging.vocabularies import SIDES, VOCABULARIES

HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """base and instruct of 24 tokens; math, and its start, know one more."""
    directory = tmp_path_factory.mktemp("vocabularies")
    vocabulary = {f"w{index}": index for index in range(24)}
    for seed, (name, added) in enumerate({"base": [], "instruct": [], "start": ["<call>"], "math": ["<call>"], "other": ["<end>"]}.items()):
        model = llama(seed)
        model.resize_token_embeddings(24 + len(added), mean_resizing=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.round(torch.randn_like(parameter) * 64) / 1024)
        model.save_pretrained(directory / name)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)))
        tokenizer.add_tokens(added)
        tokenizer.save_pretrained(directory / name)
    return directory


@pytest.fixture
def lata(saved, monkeypatch, tmp_path, capsys):
    """Runs a command in a fresh directory that sees the models; gives exit status, standard output and standard error."""
    for path in saved.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def run(line):
        status = main(line.split())
        return status, *capsys.readouterr()

    return run


def head(path):
    return read_back(path)[HEAD]


def test_a_tuned_model_with_new_tokens_is_merged_on_request(lata, saved, tmp_path):
    assert lata("extract base instruct --output instruction --kind instruction")[0] == 0
    status, printed, said = lata(
        "merge instruct math --instruction instruction --outside 0.5 --scale 0.5 --vocabulary union --output merged"
    )
    assert (status, printed) == (0, "merged\n")
    assert "lata: only math has row 24 ('<call>'): they are taken from it\n" in said
    start, tuned, found = head(saved / "instruct"), head(saved / "math"), head(tmp_path / "merged")
    assert torch.equal(found, torch.cat([start + 0.25 * (tuned[:24] - start), tuned[24:]]))
    assert AutoModelForCausalLM.from_pretrained("merged").config.vocab_size == len(AutoTokenizer.from_pretrained("merged")) == 25
    record = json.loads((tmp_path / "merged/merge.json").read_text())
    assert record["vocabulary"]["rows_of"] == "union"
    assert len(record["terms"][0]["coefficients"]) == 2
    assert lata("verify merged")[0] == 0


def test_an_instruction_vector_with_more_tokens_serves_a_vector_with_fewer(lata, saved, tmp_path):
    lata("extract base start --output instruction --kind instruction --vocabulary tuned")
    lata("extract base instruct --output vector")
    assert lata("merge instruct vector --instruction instruction --check-base false --vocabulary onto --output merged")[0] == 0
    assert head(tmp_path / "merged").shape == (24, 8)


def test_a_vector_from_base_is_merged_without_an_instruction_vector_of_fewer_tokens(lata, saved, tmp_path):
    # start + (math − start) − (instruct − base), on the rows that all have.
    lata("extract base instruct --output instruction --kind instruction")
    line = "merge start math --start base --instruction instruction --weighting none --vocabulary onto --check-base false --output merged"
    assert lata(line)[0] == 0
    math, base, instruct = (head(saved / name) for name in ("math", "base", "instruct"))
    expected = math.clone()
    expected[:24] -= instruct - base
    assert torch.equal(head(tmp_path / "merged"), expected)


def test_forget_takes_the_option_too(lata, saved, tmp_path):
    assert lata("forget instruct math --weighting none --vocabulary onto --output forgotten")[0] == 0
    target, unwanted = head(saved / "instruct"), head(saved / "math")
    assert torch.equal(head(tmp_path / "forgotten"), target - (unwanted[:24] - target))


@pytest.mark.parametrize(("side", "rows", "what"), [("start", 24, "left out"), ("tuned", 25, "zero")])
def test_extract_says_what_became_of_rows_that_one_side_lacks(lata, tmp_path, side, rows, what):
    status, _, said = lata(f"extract instruct math --vocabulary {side} --output vector")
    assert status == 0
    assert said == f"lata: only math has row 24 ('<call>'): no difference is known there, they are {what} in the vector\n"
    entries = json.loads((tmp_path / "vector/task_vector.json").read_text())["tensors"]
    assert entries[HEAD]["shape"] == [rows, 8]
    assert lata("verify vector")[0] == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("extract instruct math --output x", "--vocabulary of lata extract, merge and forget"),
        ("merge instruct math --output x", "--vocabulary of lata extract, merge and forget"),
        ("merge instruct vector --vocabulary union --output x", "Give the tuned model itself in its place"),
        ("merge instruct math other --vocabulary union --output x", "24 is '<call>' and '<end>'"),
        ("extract math other --vocabulary start --output x", "24 is '<call>' and '<end>'"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing_behind(lata, tmp_path, line, message):
    lata("extract start math --output vector")
    status, printed, said = lata(line)
    assert (status, printed) == (1, "")
    assert said.startswith("lata: error: ")
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_help_lists_the_same_choices_as_the_library(capsys):
    for command, choices in (("merge", VOCABULARIES), ("forget", VOCABULARIES), ("extract", SIDES)):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        printed = capsys.readouterr().out
        assert all(choice in printed for choice in choices)


def test_a_regression_of_models_with_other_tokens_keeps_those_of_the_start(lata, saved, tmp_path):
    status, printed, said = lata("regress instruct math other --vocabulary onto --output one")
    assert status == 0
    assert "one vector of 2" in printed
    assert "only math has row 24 ('<call>')" in said
    assert lata("merge instruct one --output merged")[0] == 0
    assert head(tmp_path / "merged").shape == (24, 8)
    assert "and one is a saved vector" in lata("regress instruct one other --vocabulary onto --output two")[2]
    assert "leave one of the two out" in lata("regress instruct math other --vocabulary onto --model teacher --output two")[2]


def test_a_method_makes_one_vector_of_models_with_other_tokens(lata, saved, tmp_path):
    status, _, said = lata("merge instruct math start --method regression --vocabulary union --output merged")
    assert status == 0
    assert "only math has row 24 ('<call>'): they are taken from it" in said
    tuned, found = head(saved / "math"), head(tmp_path / "merged")
    assert found.shape == (25, 8)
    assert torch.equal(found[24:], tuned[24:])
    assert lata("regress instruct math start --vocabulary onto --output one")[0] == 0
    lata("merge instruct one --output from-one")
    assert torch.equal(found[:24], head(tmp_path / "from-one"))
