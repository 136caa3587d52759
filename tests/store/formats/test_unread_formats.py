import pickle

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import weights, write_model

from lata_lightning.cli.main import main
from lata_lightning.errors import SourceError
from lata_lightning.store.formats.table import find_format
from lata_lightning.store.opening import open_source
from lata_lightning.vectors.inspection import describe

FILES = {
    "model.gguf": (b"GGUF\x03\x00\x00\x00", "GGUF file.*gguf_file='model.gguf'"),
    "model.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer.*git lfs pull"),
    "pytorch_model.bin": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer.*git lfs pull"),
    "tf_model.h5": (b"\x89HDF\r\n\x1a\n", "HDF5 file"),
    "weights.pkl": (pickle.dumps({"a": 1}), "plain pickle.*Unpickling can run code"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_known_format_is_refused_with_the_way_on_whatever_its_name(tmp_path, name):
    data, words = FILES[name]
    for path in (tmp_path / name, tmp_path / "x.ckpt"):
        path.write_bytes(data)
        with pytest.raises(SourceError, match=words.replace("model.gguf", path.name)):
            open_source(path)
        assert describe(path)["holds"].endswith("which is not read here")
        assert "what to do" in describe(path)
        with pytest.raises(SourceError, match="which is not read here"):
            find_format(path).verify(path)


@pytest.mark.parametrize(
    "names",
    [
        ["global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt", "global_step3/mp_rank_00_model_states.pt", "latest", "zero_to_fp32.py"],
        ["checkpoint/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "checkpoint/zero_pp_rank_0_mp_rank_00_model_states.pt", "latest"],
        ["zero_pp_rank_1_mp_rank_00_optim_states.pt"],
        ["mp_rank_00_model_states.pt"],
    ],
)
def test_a_deepspeed_directory_is_refused_with_the_command_that_converts_it(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save({}, tmp_path / name)
    with pytest.raises(SourceError, match=r"DeepSpeed checkpoint directory.*convert_zero_checkpoint_to_fp32_state_dict.*zero_to_fp32.py"):
        open_source(tmp_path)


def test_a_model_that_is_saved_beside_the_state_of_deepspeed_is_read(tmp_path):
    write_model(tmp_path / "m", weights())
    (tmp_path / "m/global_step3").mkdir()
    torch.save({}, tmp_path / "m/global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert set(open_source(tmp_path / "m").names) == set(weights())


def test_a_format_without_hashes_cannot_be_verified(tmp_path, capsys):
    torch.save(weights(), tmp_path / "a.ckpt")
    save_file(weights(), tmp_path / "a.safetensors")
    for name, kind in (("a.ckpt", "file of torch.save"), ("a.safetensors", "safetensors file")):
        assert main(["verify", str(tmp_path / name)]) == 1
        assert f"is a {kind}, with no hashes to compare with" in capsys.readouterr().err
