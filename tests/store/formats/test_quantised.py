import pytest
import torch
from tiny_models import write_model

from lata_lightning.errors import SourceError
from lata_lightning.store.opening import open_source
from lata_lightning.vectors.inspection import describe

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
