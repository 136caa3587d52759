"""The exported configuration, run by mergekit itself, beside our own merge."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from architectures import loaded, save_family
from tiny_models import read_back

from lata_lightning.exports.mergekit import export_mergekit
from lata_lightning.merging.merge import Term, merge
from lata_lightning.vectors.task_vector import TaskVector

pytest.importorskip("mergekit")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def run(directory):
    """What mergekit writes, in this process; under whole paths, as it remembers models by their paths."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    text = (directory / "merge.yaml").read_text().replace('"./', f'"{directory}/')
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(text)),
        out_path=str(directory / "OUTPUT"),
        options=MergeOptions(copy_tokenizer=False, quiet=True, device="cpu"),
    )
    return directory / "OUTPUT"


def weighted(models, label, level="tensor"):
    vector = TaskVector.between(str(models["start"]), str(models[label]))
    coefficients = {layer: 0.1 * (index % 4) for index, layer in enumerate(vector.layers.layers(level))}
    manifest = replace(vector.manifest, level=level, outside=0.5, coefficients=coefficients, weighting="linear")
    return TaskVector(vector.tensors, manifest)


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("llama", True), ("gpt2", True), ("t5", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("written", [False, True])
def test_mergekit_computes_what_a_merge_computes(tmp_path, name, tied, dtype, written):
    models = save_family(tmp_path, name, tied=tied, dtype=dtype)
    terms = [Term(weighted(models, "tuned-1"), 0.37), Term(weighted(models, "tuned-2"), -0.8)]
    if written:
        for number, term in enumerate(terms, start=1):
            term.vector.save(tmp_path / f"vector-{number}")
            models[f"tuned-{number}"].rename(tmp_path / f"gone-{number}")
        terms = [Term(TaskVector.open(tmp_path / f"vector-{number}"), term.scale) for number, term in enumerate(terms, start=1)]
    export_mergekit(terms, tmp_path / "export")
    ours, theirs = read_back(merge(models["start"], terms, tmp_path / "ours")), read_back(run(tmp_path / "export"))
    assert set(ours) == set(theirs)
    start = read_back(models["start"])
    for key, tensor in ours.items():
        assert theirs[key].dtype == dtype
        if all(term.factor(key) == 0 for term in terms):
            assert torch.equal(theirs[key], start[key])
        # Sums in float32 of numbers below four, each of up to four roundings; then one rounding to the dtype.
        unit = 2.0**-7 * tensor.double().abs() if dtype == torch.bfloat16 else 0.0
        assert ((theirs[key].double() - tensor.double()).abs() <= unit + 4 * 4 * 2.0**-24).all(), key


def test_experts_have_their_weights_in_mergekit(tmp_path):
    models = save_family(tmp_path, "mixtral")
    term = Term(weighted(models, "tuned-1", "block"), 0.5)
    export_mergekit([term], tmp_path / "export")
    ours = loaded("mixtral", merge(models["start"], [term], tmp_path / "ours")).state_dict()
    theirs = loaded("mixtral", run(tmp_path / "export")).state_dict()
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=0, atol=2.0**-20)


def test_the_command_of_the_card_runs_in_the_directory(tmp_path):
    models = save_family(tmp_path, "llama")
    term = Term(weighted(models, "tuned-1").pure(), 0.5)
    export_mergekit([term], tmp_path / "export")
    command = [str(Path(sys.executable).parent / "mergekit-yaml"), "merge.yaml", "OUTPUT", "--no-copy-tokenizer"]
    subprocess.run(command, cwd=tmp_path / "export", check=True, capture_output=True)
    ours, theirs = read_back(merge(models["start"], [term], tmp_path / "ours")), read_back(tmp_path / "export" / "OUTPUT")
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=0, atol=2.0**-20)
