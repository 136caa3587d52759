"""Builders of small weights that several test files share; file formats are written by safetensors and torch, not by the code under test."""

import json

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

BLOCKS = ("model.layers.0", "model.layers.1")


def weights(seed=0, *, width=4, vocabulary=6, dtype=torch.float32, spread=1.0, step=None):
    """A state dict with the names of a Llama of two blocks; with a step, every value is a multiple of it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for block in BLOCKS:
        shapes |= {
            f"{block}.self_attn.q_proj.weight": (width, width),
            f"{block}.mlp.up_proj.weight": (2 * width, width),
            f"{block}.input_layernorm.weight": (width,),
        }
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
    found = {name: torch.randn(shape, generator=generator, dtype=torch.float64) * spread for name, shape in shapes.items()}
    if step is not None:
        found = {name: torch.round(tensor / step) * step for name, tensor in found.items()}
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def plus(one, other, factor=1.0):
    """One + factor · other in float64, rounded to the dtype of one."""
    return {name: (one[name].double() + factor * other[name].double()).to(one[name].dtype) for name in one}


def tied_to_embedding(tensors, *, twice):
    """The same weights with a head that is the embedding, stored twice or once."""
    found = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    return found | ({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()} if twice else {})


def write_model(directory, tensors, *, shards=1, config=None):
    """A Hugging Face directory with one or several files."""
    directory.mkdir(parents=True)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        files = {name: f"model-{index % shards + 1:05d}-of-{shards:05d}.safetensors" for index, name in enumerate(names)}
        for file in sorted(set(files.values())):
            save_file({name: tensors[name] for name in names if files[name] == file}, directory / file, metadata={"format": "pt"})
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (directory / "config.json").write_text(json.dumps({"model_type": "made-up", **(config or {})}))
    return directory


def write_checkpoint(path, tensors, prefix="model.", **more):
    """A Lightning checkpoint whose LightningModule holds the model under a prefix."""
    torch.save({"state_dict": {prefix + name: tensor for name, tensor in tensors.items()} | more, "pytorch-lightning_version": "2.6"}, path)
    return path


def llama(seed=0, *, tied=False, dtype=torch.float32):
    """A Llama of two blocks that transformers can save and load."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def bits(tensor):
    """The bit pattern of a tensor, in which -0.0 differs from 0.0 and a NaN equals itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(one, other):
    """Whether two sets of tensors hold the same names, dtypes, shapes and bits."""
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and one[name].shape == other[name].shape and torch.equal(bits(one[name]), bits(other[name]))
        for name in one
    )


def read_back(directory):
    """All tensors of a directory, read by safetensors itself."""
    from safetensors.torch import load_file

    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def leftovers(directory):
    """Names of partial outputs in a directory."""
    return [path.name for path in directory.iterdir() if "partial" in path.name]


# Settings of a causal language model whose logits differ clearly.
SMALL_CONFIG = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.5,
}
