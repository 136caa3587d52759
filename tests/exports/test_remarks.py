"""What is said of an adapter that is large or lossy, against numpy's singular values and the sizes of the files."""

import json

import numpy as np
import pytest
from adapting import save_adapter
from architectures import save_family
from passed_warnings import GRADIENT_CHECKPOINTING
from safetensors.torch import load_file

from lata_lightning.cli.main import main
from lata_lightning.exports.peft import export_peft
from lata_lightning.exports.remarks import loss_remark, size_remark
from lata_lightning.merging.merge import Term
from lata_lightning.vectors.task_vector import TaskVector

pytestmark = GRADIENT_CHECKPOINTING


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("llama"), "llama")


def dense(models):
    return TaskVector.between(str(models["start"]), str(models["tuned-1"]))


def test_the_rank_that_loses_a_tenth_is_that_of_the_singular_values(tmp_path, models):
    said = []
    export_peft([Term(dense(models))], tmp_path / "adapter", rank=1, note=said.append)
    lost = json.loads((tmp_path / "adapter/reconstruction.json").read_text())["all"]
    ranks = []
    for tensor in dense(models).values():
        if tensor.ndim == 2:
            energy = np.cumsum(np.linalg.svd(tensor.double().numpy(), compute_uv=False) ** 2)
            ranks.append(int(np.sum(energy < 0.99 * energy[-1])) + 1)
    (loss,) = [sentence for sentence in said if "loses" in sentence]
    assert f"at rank 1 the adapter loses {lost:.0%} of the norm" in loss
    assert f"--energy 0.99 needs ranks up to {max(ranks)};" in loss


def test_with_that_energy_nothing_is_said_of_loss(tmp_path, models):
    said = []
    export_peft([Term(dense(models))], tmp_path / "adapter", energy=0.995, note=said.append)
    assert not any("loses" in sentence for sentence in said)


def test_an_adapter_larger_than_half_the_model_is_said_to_be(tmp_path, models):
    said = []
    export_peft([Term(dense(models))], tmp_path / "adapter", rank=16, note=said.append)
    sizes = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in (
        tmp_path / "adapter/adapter_model.safetensors", models["start"] / "model.safetensors"
    )]  # fmt: skip
    assert sizes[0] > sizes[1] / 2
    (size,) = [sentence for sentence in said if "takes" in sentence]
    assert f"the adapter takes {sizes[0] / 1e6:.2f} MB" in size
    assert f"the model itself takes {sizes[1] / 1e6:.2f} MB" in size
    assert "norm" in size  # the modules that are stored whole


def test_nothing_is_said_of_a_lora_vector(tmp_path, models):
    said = []
    place = save_adapter(tmp_path / "lora", "llama", models["start"], target_modules=["q_proj"])
    export_peft([Term(TaskVector.between(str(models["start"]), place))], tmp_path / "adapter", note=said.append)
    assert said == []


def test_the_command_prints_the_sentence_on_standard_error(tmp_path, models, capsys):
    dense(models).save(tmp_path / "vector")
    assert main(["export", str(tmp_path / "vector"), "--to", "peft", "--rank", "1", "--output", str(tmp_path / "adapter")]) == 0
    said = capsys.readouterr()
    assert "the adapter loses" in said.err
    assert said.out.strip() == str(tmp_path / "adapter")


def test_remarks_begin_where_they_matter():
    record = {"rank": 16, "energy": None}
    assert loss_remark({**record, "all": 0.1}, {"q_proj": 3}) is None
    assert loss_remark({**record, "all": None}, {"q_proj": 3}) is None
    assert loss_remark({**record, "all": 0.5}, {}) is None
    assert "at 0.5 of the squared norm" in loss_remark({"rank": None, "energy": 0.5, "all": 0.5}, {"q_proj": 3})
    assert size_remark(50, 100, {}) is None
    assert "2.00 GB, 1.50 GB of it for modules that are stored whole, 2: ['embed', 'head']" in size_remark(
        2_000_000_000, 1_000_000_000, {"head": 500_000_000, "embed": 1_000_000_000}
    )
