import json
from typing import get_args

import pytest
import torch
from tiny_models import llama, read_back

from lata_lightning.cli.main import main, parser_of
from lata_lightning.exports import EXPORTS
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.task_vector import TaskVector

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """A directory with start, tuned, and the vectors ``one`` (with coefficients) and ``other`` between them."""
    directory = tmp_path_factory.mktemp("vectors")
    for seed, label in enumerate(("start", "tuned")):
        llama(seed).save_pretrained(directory / label)
    vector = TaskVector.between(str(directory / "start"), str(directory / "tuned"))
    instruction = TaskVector.between(llama(4), llama(5), kind="instruction")
    vector.weighted(align(vector, instruction, check_base=False), "linear").save(directory / "one")
    vector.save(directory / "other")
    return directory


@pytest.fixture
def lata(vectors, tmp_path, capsys):
    """Runs a command, paths of vectors given as {v}; gives exit status, standard output and standard error."""

    def run(line):
        status = main([part.format(v=vectors, out=tmp_path / "out") for part in line.split()])
        return (status, *capsys.readouterr())

    return run


@pytest.mark.parametrize("kind", EXPORTS)
def test_every_export_prints_where_it_is(lata, tmp_path, kind):
    status, out, _ = lata(f"export {{v}}/one --to {kind} --weighting linear --output {{out}}")
    assert (status, out) == (0, f"{tmp_path / 'out'}\n")
    assert any((tmp_path / "out").iterdir())


def test_what_a_precision_costs_a_pure_vector_is_told(lata):
    _, _, err = lata("export {v}/one --to pure --weighting stored --dtype bfloat16 --output {out}")
    assert "bfloat16 made 0.00% of the nonzero entries zero; cosine to the full-precision vector 0.99999" in err


def test_what_a_rank_costs_an_adapter_is_told(lata, tmp_path):
    _, _, err = lata("export {v}/other --to peft --rank 2 --output {out}")
    error = json.loads((tmp_path / "out" / "reconstruction.json").read_text())["all"]
    assert f"differs from the weighted vectors by {error:.3g} of their norm" in err
    assert "export" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_of_a_sum_of_nothing_tells_no_error(lata):
    status, _, err = lata("export {v}/other {v}/other --to peft --scale 1 -1 --output {out}")
    assert status == 0
    assert "differs" not in err


def test_scales_are_those_of_a_merge(lata, vectors, tmp_path):
    lata("export {v}/other {v}/other --to hf --scale 0.5 -0.25 --output {out}")
    start, tuned = read_back(vectors / "start"), read_back(vectors / "tuned")
    for name, tensor in read_back(tmp_path / "out").items():
        difference = (tuned[name] - start[name]).double()
        assert torch.equal(tensor, (start[name].double() + 0.25 * difference).float())


def test_one_scale_too_few_is_an_error_of_one_line(lata, tmp_path):
    status, _, err = lata("export {v}/one {v}/one {v}/one --to hf --scale 1 2 --output {out}")
    assert status == 1
    assert err == "lata: error: give one scale for all vectors or one for each: got 2 scales for 3 vectors\n"
    assert not (tmp_path / "out").exists()


def test_the_command_offers_just_the_exports_there_are():
    assert get_args(parser_of("export").types["to"]) == EXPORTS
