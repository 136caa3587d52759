import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy

from lata_lightning.training.checkpoint_io import StreamedCheckpointIO, stream_checkpoints

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
STATE = {"state_dict": {"weight": torch.arange(6.0)}, "global_step": 3}


def test_a_checkpoint_is_read_back_by_torch_and_by_lightning(tmp_path):
    path = tmp_path / "deep" / "last.ckpt"
    StreamedCheckpointIO().save_checkpoint(STATE, path)
    for loaded in (torch.load(path, weights_only=True), TorchCheckpointIO().load_checkpoint(path)):
        assert loaded["global_step"] == 3
        torch.testing.assert_close(loaded["state_dict"]["weight"], torch.arange(6.0), rtol=0, atol=0)
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


def test_torch_writes_to_a_file_and_not_into_memory(tmp_path, monkeypatch):
    targets, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda state, target: (targets.append(target), save(state, target)))
    StreamedCheckpointIO().save_checkpoint(STATE, tmp_path / "last.ckpt")
    assert [target.parent for target in targets] == [tmp_path]


def test_a_checkpoint_that_cannot_be_finished_leaves_the_earlier_one(tmp_path):
    path = tmp_path / "last.ckpt"
    StreamedCheckpointIO().save_checkpoint(STATE, path)
    with pytest.raises(Exception, match=r"pickle|local object"):
        StreamedCheckpointIO().save_checkpoint({"callbacks": lambda: None}, path)
    assert torch.load(path, weights_only=True)["global_step"] == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_remote_checkpoint_is_written_as_lightning_writes_it():
    StreamedCheckpointIO().save_checkpoint(STATE, "memory://run/last.ckpt")
    assert TorchCheckpointIO().load_checkpoint("memory://run/last.ckpt")["global_step"] == 3


def test_storage_options_are_refused_as_by_lightning(tmp_path):
    with pytest.raises(TypeError, match="storage_options"):
        StreamedCheckpointIO().save_checkpoint(STATE, tmp_path / "last.ckpt", storage_options={})


def test_a_trainer_of_one_device_streams_its_checkpoints():
    trainer = Trainer(**QUIET)
    stream_checkpoints(trainer)
    assert type(trainer.strategy.checkpoint_io) is StreamedCheckpointIO


def test_a_trainer_with_a_way_of_writing_of_its_own_keeps_it():
    trainer = Trainer(**QUIET, plugins=[AsyncCheckpointIO()])
    stream_checkpoints(trainer)
    assert type(trainer.strategy.checkpoint_io) is AsyncCheckpointIO
    sharded = Trainer(**QUIET, strategy=ModelParallelStrategy())
    stream_checkpoints(sharded)
    assert type(sharded.strategy._checkpoint_io) is not StreamedCheckpointIO
