"""What the tests of exported adapters share: LoRA on a saved model with random factors, and references computed apart from the package."""

import torch
from architectures import loaded
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file


def save_adapter(directory, name, start, *, seed=0, **settings):
    """A peft adapter with random factors, saved by peft."""
    torch.manual_seed(seed)
    model = get_peft_model(loaded(name, start), LoraConfig(**{"r": 2, "lora_alpha": 4, "init_lora_weights": False, **settings}))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape) + ("modules_to_save" in key) * parameter)
    model.save_pretrained(directory)
    return directory


def adapted(name, start, adapter, factor=1.0):
    """The whole weights a model has with an adapter on it, by peft alone; its factors times a number."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(loaded(name, start).double(), adapter)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= factor
    return {key: tensor.clone() for key, tensor in model.merge_and_unload().state_dict().items()}


def reference(directory, start, terms):
    """A model directory with start + Σ factor · (tuned − start), in float64 and rounded once; factors by tensor or one for all."""
    origin = load_file(start / "model.safetensors")
    found = {}
    for name, weight in origin.items():
        total = weight.double()
        for tuned, factor in terms:
            difference = load_file(tuned / "model.safetensors")[name].double() - weight.double()
            total = total + (factor[name] if isinstance(factor, dict) else factor) * difference
        found[name] = total.to(weight.dtype) if weight.is_floating_point() else weight
    directory.mkdir()
    save_file(found, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text((start / "config.json").read_text())
    return directory
