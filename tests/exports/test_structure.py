import pytest
import torch
from adapting import reference
from architectures import loaded, moved, save_family
from peft import PeftModel
from safetensors.torch import save_file
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from lata_lightning.errors import LataError
from lata_lightning.exports import structure as structures
from lata_lightning.exports.peft import export_peft
from lata_lightning.exports.structure import Structure
from lata_lightning.merging.merge import Term
from lata_lightning.store.opening import open_source
from lata_lightning.store.sources import StateDictSource
from lata_lightning.vectors.task_vector import TaskVector

# peft asks a model for it, and transformers gives it another name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS = {
    # Depthwise convolutions.
    "convnext": lambda: ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, num_labels=3)),
    "resnet": lambda: ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=3)),
    # torch's own attention, whose layers are not called.
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=8, patch_size=4)),
    # An embedding that multiplies what it looks up.
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, vocab_size=24, num_key_value_heads=1, head_dim=4, tie_word_embeddings=False, pad_token_id=0)
    ),
}
INPUTS = {
    "convnext": {"pixel_values": torch.linspace(-9, 9, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)},
    "resnet": {"pixel_values": torch.linspace(-9, 9, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)},
    "siglip": {"pixel_values": torch.linspace(-9, 9, 2 * 3 * 8 * 8).sin().reshape(2, 3, 8, 8)},
    "gemma3": {"input_ids": torch.arange(1, 9)[None]},
}


@torch.no_grad()
def outputs(name, model):
    found = model.eval()(**INPUTS[name])
    return found["logits"] if "logits" in found else found["pooler_output"]


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_peft_does_not_adapt_rightly_are_stored_whole(tmp_path, name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.save_pretrained(tmp_path / "start")
    moved(model, seed=1).save_pretrained(tmp_path / "tuned")
    export_peft([Term(TaskVector.between(str(tmp_path / "start"), str(tmp_path / "tuned")), 0.5)], tmp_path / "adapter", rank=1000)
    wanted = type(model).from_pretrained(reference(tmp_path / "wanted", tmp_path / "start", [(tmp_path / "tuned", 0.5)]))
    adapted = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "start"), tmp_path / "adapter")
    torch.testing.assert_close(outputs(name, adapted), outputs(name, wanted), rtol=1e-4, atol=1e-5)
    merged = adapted.merge_and_unload().state_dict()
    for key, tensor in wanted.state_dict().items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-5, atol=1e-6)


def test_each_kind_of_layer_has_its_form(tmp_path):
    forms = {}
    for name, make in MODELS.items():
        model = make()
        model.config.architectures = [type(model).__name__]
        found = Structure(StateDictSource(model))
        forms |= {f"{name} {path}": found.form(path) for path, _ in found.module.named_modules() if path}
    assert forms["gemma3 model.layers.0.mlp.down_proj"] == "linear"
    assert forms["gemma3 model.embed_tokens"] is None
    assert forms["gemma3 model.norm"] is None
    assert forms["siglip embeddings.position_embedding"] == "embedding"
    assert forms["siglip head.attention.out_proj"] is None
    assert forms["convnext convnext.embeddings.patch_embeddings"] == "convolution"
    assert forms["convnext convnext.encoder.stages.0.layers.0.dwconv"] is None


def test_experts_are_put_together_as_transformers_does(tmp_path):
    models = save_family(tmp_path, "mixtral")
    source = open_source(models["start"])
    found = Structure(source)

    for name, tensor in loaded("mixtral", models["start"]).state_dict().items():
        assert torch.equal(found.read(found.by_name[name], source.read), tensor), name


def test_stored_tensors_that_do_not_make_up_the_whole_are_refused(tmp_path, monkeypatch):
    models = save_family(tmp_path, "mixtral")
    source = open_source(models["start"])
    found = Structure(source)
    whole = structures.under_checkpoint_names
    monkeypatch.setattr(structures, "under_checkpoint_names", lambda *given: dict(list(whole(*given).items())[1:]))
    with pytest.raises(LataError, match=r"gate_up_proj cannot be put together from the tensors of a checkpoint: 8: \["):
        found.read(found.by_name["model.layers.0.mlp.experts.gate_up_proj"], source.read)


BARE = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=24, n_positions=16), "transformer."),
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL, vocab_size=24, pad_token_id=0), "model."),
}


@pytest.mark.parametrize("name", BARE)
def test_a_start_whose_names_lack_the_prefix_of_its_class_gets_an_adapter_for_that_class(tmp_path, name):
    torch.manual_seed(0)
    kind, config, prefix = BARE[name]
    model = kind(config)
    for directory in ("start", "tuned"):
        bare = {key.removeprefix(prefix): tensor for key, tensor in model.state_dict().items() if key.startswith(prefix)}
        config.architectures = [kind.__name__]
        config.save_pretrained(tmp_path / directory)
        save_file(bare, tmp_path / directory / "model.safetensors", {"format": "pt"})
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "q_proj" in key or "c_attn" in key:
                    parameter.add_(torch.randn_like(parameter))
    export_peft([Term(TaskVector.between(tmp_path / "start", tmp_path / "tuned"))], tmp_path / "adapter", rank=8)
    merged = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "start"), tmp_path / "adapter").merge_and_unload()
    for key, tensor in kind.from_pretrained(tmp_path / "tuned").state_dict().items():
        if key.startswith(prefix):
            torch.testing.assert_close(merged.state_dict()[key], tensor, rtol=1e-5, atol=1e-5)
