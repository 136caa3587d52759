import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import weights, write_model

from lata_lightning.cli.main import main
from lata_lightning.errors import CorruptFileError, SourceError
from lata_lightning.store.formats.table import FORMATS, find_format
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


@pytest.mark.parametrize("data", [b"", b"x", b"garbage" * 100, b"\x00" * 100, json.dumps({"a": 1}).encode()])
@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.gguf", "model", "model.ckpt"])
def test_a_file_of_no_format_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError if data else CorruptFileError, match="is of no format that is read here" if data else "is empty"):
        open_source(tmp_path / name)


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


def test_every_format_has_a_name_of_its_own():
    assert len({known.name for known in FORMATS}) == len(FORMATS)


def test_a_format_without_hashes_cannot_be_verified(tmp_path, capsys):
    torch.save(weights(), tmp_path / "a.ckpt")
    save_file(weights(), tmp_path / "a.safetensors")
    for name, kind in (("a.ckpt", "file of torch.save"), ("a.safetensors", "safetensors file")):
        assert main(["verify", str(tmp_path / name)]) == 1
        assert f"is a {kind}, with no hashes to compare with" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["any.safetensors", "any.bin", "any", "any.ckpt"])
def test_a_safetensors_file_is_known_by_its_content(tmp_path, name):
    save_file(weights(), tmp_path / name)
    assert open_source(tmp_path / name).names == tuple(sorted(weights()))
    assert describe(tmp_path / name)["format"] == "safetensors file"


# Quantised weights

FULL = {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4)}
NAME = "model.layers.0.mlp.up_proj"
PACKED = {
    "GPTQ or AWQ": {
        f"{NAME}.qweight": torch.ones(2, 4).int(),
        f"{NAME}.qzeros": torch.ones(1, 2).int(),
        f"{NAME}.scales": torch.ones(1, 4).half(),
    },
    "compressed-tensors": {f"{NAME}.weight_packed": torch.ones(4, 1).int(), f"{NAME}.weight_scale": torch.ones(4, 1)},
    "bitsandbytes": {
        f"{NAME}.weight": torch.ones(8, 1).byte(),
        f"{NAME}.weight.absmax": torch.ones(1),
        f"{NAME}.weight.quant_map": torch.ones(16),
    },
    "fp8": {f"{NAME}.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), f"{NAME}.weight_scale_inv": torch.ones(1, 1)},
    "mxfp4": {f"{NAME}_blocks": torch.ones(2, 2).byte(), f"{NAME}_scales": torch.ones(2).byte()},
}


@pytest.mark.parametrize("library", PACKED)
def test_packed_tensors_are_refused_in_any_file(tmp_path, library):
    words = f"must hold the weights in full; they are quantised by {library}"
    write_model(tmp_path / "m", PACKED[library])
    torch.save(PACKED[library], tmp_path / "m.bin")
    for path in (tmp_path / "m", tmp_path / "m/model.safetensors", tmp_path / "m.bin"):
        with pytest.raises(SourceError, match=words):
            open_source(path)
    assert describe(tmp_path / "m")["quantised by"] == library


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("bitsandbytes", r"model.dequantize\(\)"), ("bitsandbytes_4bit", r"model.dequantize\(\)"), ("fp8", "FineGrainedFP8Config"),
        ("mxfp4", "Mxfp4Config"),
        ("compressed-tensors", "CompressedTensorsConfig"), ("gptq", "where its library can"), ("awq", "where its library can"),
    ],
)  # fmt: skip
def test_a_config_that_says_so_is_enough(tmp_path, method, call):
    write_model(tmp_path / "m", FULL, config={"quantization_config": {"quant_method": method}})
    with pytest.raises(SourceError, match=rf"they are quantised by {method.removesuffix('_4bit')}.*{call}"):
        open_source(tmp_path / "m")


@pytest.mark.parametrize(
    "more",
    [
        {f"{NAME}.scales": torch.ones(4)}, {f"{NAME}.weight_scale": torch.ones(1)}, {"my_blocks": torch.ones(2).byte()},
        {f"{NAME}.qweight": torch.ones(2)},
    ],
    ids=["scales", "weight_scale", "blocks", "qweight"],
)  # fmt: skip
def test_names_that_only_look_like_packed_ones_are_read(tmp_path, more):
    write_model(tmp_path / "m", {**FULL, **more})
    assert set(open_source(tmp_path / "m").names) == {*FULL, *more}
