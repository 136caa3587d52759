"""FSDP1 on two CPU processes: what is measured on flat parameters is what whole tensors would give."""

import pytest
import torch
from lightning_models import make_models
from two_processes import check_exact, history, start

from lata_lightning import TaskVector

UNEVEN = {"vocab_size": 33, "intermediate_size": 25}
TIED = ("flat", "gradients")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same models with untied and with tied embeddings."""
    root = tmp_path_factory.mktemp("models")
    for name, tied in (("untied", False), ("tied", True)):
        (root / name).mkdir()
        make_models(root / name, tie_word_embeddings=tied, **UNEVEN)
    return root


@pytest.fixture(scope="module")
def output(models, tmp_path_factory):
    """A directory with the results of each case of the script."""
    output = tmp_path_factory.mktemp("fsdp1")
    start(output, "fsdp1_run.py", models / "untied", models / "tied", output)
    return output


@pytest.mark.parametrize("case", ["original", "flat", "gradients", "replicas", "hybrid", "frozen"])
def test_flat_parameters_give_the_figures_of_the_whole_tensors(models, output, case):
    check_exact(models / ("tied" if case in TIED else "untied"), output / case, output / case / "tuned.ckpt", [3, 4, 6, 8])


def test_tied_weights_appear_once_and_are_recorded(output):
    for case in TIED:
        vector = TaskVector.open(output / case / "lata/task_vector")
        assert "lm_head.weight" not in vector
        assert vector.manifest.tied == (("lm_head.weight", "model.embed_tokens.weight"),)


def test_a_frozen_tensor_is_recorded_as_unchanged(output):
    assert TaskVector.open(output / "frozen/lata/task_vector").unchanged == {"model.embed_tokens.weight"}


def test_training_is_bit_identical_with_and_without_the_callback(output):
    with_callback, without = (torch.load(output / case / "tuned.ckpt", weights_only=True)["state_dict"] for case in ("original", "without"))
    assert all(torch.equal(with_callback[name], without[name]) for name in without)


@pytest.mark.parametrize("case", ["resumed", "spilled"])
def test_a_resumed_run_ends_like_the_uninterrupted_one(output, case):
    assert history(output / case) == history(output / "original")
    one, other = (TaskVector.open(output / name / "lata/task_vector") for name in (case, "original"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_adapters_are_refused_before_the_first_step_on_both_processes(output):
    first, second = ((output / f"adapted/refused-{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert "cannot measure adapters under FSDPStrategy" in first
    assert "ModelParallelStrategy (FSDP2)" in first
