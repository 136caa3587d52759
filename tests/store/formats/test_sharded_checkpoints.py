import pytest
import torch
from sharded_files import contents, saved
from tiny_models import same_bits, weights

from lata_lightning.cli.main import main
from lata_lightning.errors import SourceError
from lata_lightning.store.opening import open_source
from lata_lightning.vectors.inspection import describe


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "app"])
def test_what_dcp_saves_is_read_without_a_process_group(tmp_path, key):
    optimizer = {"state": {"w": {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    path = saved(tmp_path / "last.ckpt", {key: weights(), "optimizer_0": optimizer, "epoch": 3})
    torch.save({"epoch": 3}, path / "meta.pt")
    source = open_source(path)
    assert same_bits(contents(source), weights())
    assert source.location == str(path)
    facts = describe(path)
    assert facts["format"] == "sharded checkpoint directory (torch.distributed.checkpoint), 1 files"
    assert facts["tensors"] == len(weights())


def test_a_bare_state_dict_and_two_models_are_told_apart(tmp_path):
    assert same_bits(contents(open_source(saved(tmp_path / "bare", weights()))), weights())
    both = saved(tmp_path / "both", {"model": weights(0), "ema": weights(1)})
    with pytest.raises(SourceError, match="must hold the model once"):
        open_source(both)
    assert same_bits(contents(open_source(both, "ema")), weights(1))


def test_extract_reads_a_checkpoint_of_sharded_training(tmp_path, capsys):
    saved(tmp_path / "last.ckpt", {"state_dict": {f"model.{name}": tensor for name, tensor in weights(1).items()}})
    torch.save(weights(0), tmp_path / "start.pt")
    assert main(["extract", str(tmp_path / "start.pt"), str(tmp_path / "last.ckpt"), "--output", str(tmp_path / "v")]) == 0
    from lata_lightning import TaskVector

    vector = TaskVector.open(tmp_path / "v")
    assert all(torch.equal(vector[name], weights(1)[name] - weights(0)[name]) for name in weights())
