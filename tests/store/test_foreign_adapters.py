"""Files and modules with parts of adapters that are not peft's, or that peft has not merged: none may pass for weights."""

import pytest
import torch
from adapter_models import wrapped
from architectures import loaded, tiny_model
from safetensors.torch import save_file
from tiny_models import weights, write_checkpoint, write_model

from lata_lightning import TaskVector
from lata_lightning.cli.main import main
from lata_lightning.errors import LataError, SourceError
from lata_lightning.store.foreign_adapters import check_no_factors
from lata_lightning.store.opening import open_source

BLOCK = "model.layers.0.self_attn.q_proj"
NAMES = {
    "litgpt": (["transformer.h.0.attn.qkv.lora_A", "transformer.h.0.attn.qkv.lora_B"], "LitGPT or loralib.*litgpt merge_lora"),
    "loralib": ([f"{BLOCK}.lora_A", f"{BLOCK}.lora_B"], "LitGPT or loralib.*its scaling is not among the weights"),
    "kohya": (["lora_unet_down_blocks_0.lora_down.weight", "lora_te_text_model.lora_up.weight", "lora_te_text_model.alpha"], "kohya or diffusers"),
    "diffusers": (["unet.down.attn.to_q.lora.up.weight", "unet.down.attn.to_q.lora.down.weight"], "kohya or diffusers.*fuse_lora"),
    "older diffusers": (["down.attn.to_q_lora.lora_linear_layer.up.weight", "down.x.to_k.lora_linear_layer.down.weight"], "kohya or diffusers"),
    "torchtune": (["layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"], "torchtune or MLX.*peft's format"),
    "MLX": ([f"{BLOCK}.lora_a", f"{BLOCK}.lora_b"], "torchtune or MLX.*mlx_lm.fuse"),
    "NeMo": (["decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight"], "NeMo or Megatron"),
    "peft, wrapped": ([f"{BLOCK}.base_layer.weight", f"{BLOCK}.lora_A.default.weight"], "wrapped by peft.*save_pretrained"),
    "peft, saved": ([f"base_model.model.{BLOCK}.lora_A.weight", f"base_model.model.{BLOCK}.lora_B.weight"], "wrapped by peft.*save_pretrained"),
    "peft, LoHa": ([f"{BLOCK}.hada_w1_a.default", f"{BLOCK}.hada_w2_b.default"], "wrapped by peft"),
    "peft, trained copy": (["lm_head.modules_to_save.default.weight"], "wrapped by peft"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_factors_among_weights_are_refused_whatever_holds_them(tmp_path, kind):
    names, message = NAMES[kind]
    tensors = weights() | {name: torch.ones(2, 2) for name in names}
    start = write_model(tmp_path / "start", weights())
    write_model(tmp_path / "model", tensors)
    save_file(tensors, tmp_path / "bare.safetensors")
    torch.save(tensors, tmp_path / "bare.pt")
    write_checkpoint(tmp_path / "last.ckpt", tensors)
    for tuned in (tmp_path / "model", tmp_path / "bare.safetensors", tmp_path / "bare.pt", tmp_path / "last.ckpt", tensors):
        with pytest.raises(SourceError, match=rf"{message}"):
            TaskVector.between(start, tuned)
        with pytest.raises(SourceError, match=r"that (is|are) not merged, \d: \["):
            open_source(tuned)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_a_proj.weight", "model.layers.0.attn.w_lora.lora.0.weight", "shared_transformer.adapter_list.0.weight",
        "model.layers.0.mlp.up_proj.weight", "flora_A.weight", "model.adapter.linear.weight", "model.layers.0.alpha",
    ],
)  # fmt: skip
def test_weights_that_only_sound_like_factors_are_read(name):
    check_no_factors([name], "a model")


def test_names_that_an_architecture_has_itself_are_weights(tmp_path):
    config = tiny_model("llama").config.to_dict()
    check_no_factors([f"{BLOCK}.weight"], "a model", config)
    with pytest.raises(SourceError, match="wrapped by peft"):
        check_no_factors([f"{BLOCK}.base_layer.weight"], "a model", config)


def test_the_command_says_it_in_one_line(tmp_path, capsys):
    start = write_model(tmp_path / "start", weights())
    save_file(weights() | {"transformer.h.0.attn.qkv.lora_A": torch.ones(2, 2)}, tmp_path / "lit.safetensors")
    assert main(["merge", str(start), str(tmp_path / "lit.safetensors"), "--output", str(tmp_path / "merged")]) == 1
    error = capsys.readouterr().err
    assert "litgpt merge_lora" in error
    assert "Traceback" not in error
    assert not (tmp_path / "merged").exists()


def test_a_module_with_factors_of_its_own_is_refused(tmp_path):
    class LoraLinear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)
            self.lora_A, self.lora_B = torch.nn.Parameter(torch.zeros(2, 4)), torch.nn.Parameter(torch.zeros(4, 2))

    with pytest.raises(LataError, match="LitGPT or loralib"):
        TaskVector.between(torch.nn.Sequential(LoraLinear()), torch.nn.Sequential(LoraLinear()))


def test_the_state_dict_of_a_wrapped_model_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "start")
    model = wrapped(loaded("llama", tmp_path / "start"), target_modules=["q_proj"])
    with pytest.raises(SourceError, match="wrapped by peft"):
        TaskVector.between(tmp_path / "start", model.state_dict())
