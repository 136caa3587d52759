"""One set of names for saved directories, modules and Lightning checkpoints, whatever transformers calls the tensors on disk."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lata_lightning import TaskVector
from lata_lightning.store.checkpoint_names import under_checkpoint_names

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "GPTNeoXForCausalLM": transformers.GPTNeoXConfig(**SIZES, **TOKENS),
    "ViTForImageClassification": transformers.ViTConfig(**SIZES, image_size=8, patch_size=4),
    "SwinModel": transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4),
    "MixtralForCausalLM": transformers.MixtralConfig(**SIZES, **TOKENS, num_key_value_heads=1, num_local_experts=2),
    "LlamaForCausalLM": transformers.LlamaConfig(**SIZES, **TOKENS, tie_word_embeddings=True),
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(params=MODELS, ids=str)
def models(request, tmp_path):
    """A start and a tuned model, and the directories they are saved in."""
    kind = getattr(transformers, request.param)
    found = []
    for name in ("start", "tuned"):
        model = kind(MODELS[request.param])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        model.save_pretrained(tmp_path / name)
        found.append(model)
    return found, tmp_path


def from_files(directory):
    """Differences of the saved tensors, read with nothing but safetensors."""
    start, tuned = (load_file(directory / name / "model.safetensors") for name in ("start", "tuned"))
    return {name: tuned[name] - start[name] for name in start if start[name].is_floating_point()}


def equal(vector, expected):
    assert set(vector) == set(expected)
    assert all(torch.equal(vector[name], expected[name]) for name in expected)


def test_a_directory_and_a_module_meet_under_the_names_on_disk(models):
    (start, tuned), directory = models
    expected = from_files(directory)
    equal(TaskVector.between(directory / "start", directory / "tuned"), expected)
    equal(TaskVector.between(directory / "start", tuned), expected)
    equal(TaskVector.between(start, directory / "tuned"), expected)
    equal(TaskVector.between(start, tuned), expected)


def test_a_lightning_checkpoint_meets_a_directory_under_the_names_on_disk(models):
    (_, tuned), directory = models
    torch.save({"state_dict": {f"net.{name}": tensor for name, tensor in tuned.state_dict().items()}}, directory / "tuned.ckpt")
    equal(TaskVector.between(directory / "start", directory / "tuned.ckpt"), from_files(directory))


def test_every_tensor_on_disk_has_its_block(models):
    _, directory = models
    vector = TaskVector.between(directory / "start", directory / "tuned")
    assert len(vector.layers.blocks) in (2, 3)
    outside = set(vector.layers.outside())
    assert all(name in outside or vector.layers.layer_of(name) in vector.layers.blocks for name in vector)


def test_other_modules_keep_their_names():
    tensors = {"weight": torch.ones(2, 2)}
    assert under_checkpoint_names(torch.nn.Linear(2, 2), tensors) == tensors


def test_tables_that_old_releases_saved_with_the_weights_are_left_out(tmp_path):
    model = transformers.LlamaForCausalLM(MODELS["LlamaForCausalLM"])
    for name in ("start", "tuned"):
        model.save_pretrained(tmp_path / name)
    file = tmp_path / "start/model.safetensors"
    state = load_file(file)
    save_file({**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file, metadata={"format": "pt"})
    assert set(TaskVector.between(tmp_path / "start", tmp_path / "tuned")) == set(state)
