"""Names and pieces of a checkpoint against those of the modules: both directions, read lazily."""

import pytest
import torch
import transformers
from architectures import moved
from safetensors.torch import load_file, save_file

from lata_lightning import TaskVector
from lata_lightning.store.checkpoint_names import checkpoint_pieces, under_checkpoint_names
from lata_lightning.store.meta_model import meta_model
from lata_lightning.store.opening import open_source
from lata_lightning.store.pairing import match

TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 160,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
BUILDERS = {
    "qwen2-vl": lambda: transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(
            text_config=TEXT | {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
            image_token_id=150,
            video_token_id=151,
            vision_start_token_id=152,
            vision_end_token_id=153,
        )
    ),
    "gemma3": lambda: transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=TEXT | {"head_dim": 8, "sliding_window": 8},
            vision_config=VISION,
            mm_tokens_per_image=4,
            image_token_index=150,
            boi_token_index=151,
            eoi_token_index=152,
        )
    ),
    "llava": lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**TEXT),
            vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=8),
            image_token_index=150,
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, num_local_experts=4)),
    "qwen3-moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **TEXT, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, decoder_sparse_step=1
        )
    ),
}


@pytest.fixture(params=BUILDERS, ids=str)
def saved(request, tmp_path):
    """One start and one tuned model, each saved with the names of the hub and with those of its modules; and the true difference."""
    torch.manual_seed(0)
    model = BUILDERS[request.param]()
    for label, seed in (("start", 0), ("tuned", 1)):
        moved(model, seed=seed)
        model.save_pretrained(tmp_path / label)
        model.save_pretrained(tmp_path / f"{label}-modules", save_original_format=False)
        torch.save({"state_dict": {f"net.{name}": tensor for name, tensor in model.state_dict().items()}}, tmp_path / f"{label}.ckpt")
    start, tuned = (load_file(tmp_path / label / "model.safetensors") for label in ("start", "tuned"))
    return tmp_path, {name: tuned[name].double() - start[name].double() for name in start}


def check(vector, expected):
    assert set(vector) == set(expected)
    assert max((tensor.double() - expected[name]).abs().max().item() for name, tensor in vector.items()) < 1e-6


@pytest.mark.parametrize(("start", "tuned"), [("start", "tuned-modules"), ("start-modules", "tuned"), ("start", "tuned.ckpt")])
def test_names_of_the_modules_meet_names_of_a_checkpoint(saved, start, tuned):
    directory, expected = saved
    vector = TaskVector.between(directory / start, directory / tuned)
    # The names are those of the start; what a checkpoint stores in pieces is in these pieces.
    stored = match(open_source(directory / "start"), vector.tensors).tuned
    assert len(stored.names) == len(vector)
    check({name: stored.read(name) for name in stored.names}, expected)


def test_a_vector_between_names_of_the_modules_fits_a_checkpoint(saved):
    directory, expected = saved
    vector = TaskVector.between(directory / "start-modules", directory / "tuned-modules").save(directory / "vector")
    found = match(open_source(directory / "start"), vector.tensors)
    check({name: found.tuned.read(name) for name in found.tuned.names}, expected)


class Counted:
    """Passes a source on and counts the entries that are read of it."""

    def __init__(self, source, monkeypatch):
        self.entries, load = 0, source.chunks

        def counted(name):
            inner = load(name)

            def piece(begin, end):
                self.entries += end - begin
                return inner(begin, end)

            return piece

        monkeypatch.setattr(source, "chunks", counted)
        monkeypatch.setattr(source, "read", None)


def test_of_fused_experts_only_the_piece_is_read(tmp_path, monkeypatch):
    model = moved(BUILDERS["mixtral"](), seed=1)
    model.save_pretrained(tmp_path / "hub")
    model.save_pretrained(tmp_path / "modules", save_original_format=False)
    modules = open_source(tmp_path / "modules")
    counted = Counted(modules, monkeypatch)
    found = match(open_source(tmp_path / "hub"), modules).tuned
    expected = load_file(tmp_path / "hub/model.safetensors")
    assert counted.entries == 0
    for expert in range(4):
        for part in ("w1", "w2", "w3"):
            name = f"model.layers.1.block_sparse_moe.experts.{expert}.{part}.weight"
            load = found.chunks(name)
            assert torch.equal(load(0, expected[name].numel()).reshape(expected[name].shape), expected[name])
    assert counted.entries == 4 * 3 * 16 * 32


def test_pieces_say_where_their_entries_lie():
    config = transformers.MixtralConfig(**TEXT, num_local_experts=3, architectures=["MixtralForCausalLM"]).to_dict()
    module = meta_model(config)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    values = {name: torch.arange(shape.numel()).reshape(shape) for name, shape in shapes.items()}
    pieces = checkpoint_pieces(module, shapes)
    # Transformers itself says what lies where.
    for name, tensor in under_checkpoint_names(module, values).items():
        piece = pieces[name]
        assert torch.equal(values[piece.origins[0]].reshape(-1).as_strided(piece.shape, piece.stride, piece.offset), tensor)


def test_checkpoints_of_two_releases_meet(tmp_path):
    model = BUILDERS["gemma3"]()
    model.save_pretrained(tmp_path / "start")
    moved(model, seed=1).save_pretrained(tmp_path / "tuned")
    start, tuned = (load_file(tmp_path / label / "model.safetensors") for label in ("start", "tuned"))
    # What releases 5.10 to 5.23 wrote.
    renamed = {name.replace("language_model.model.", "model.language_model.model.").replace("vision_tower", "model.vision_tower"): tensor
               for name, tensor in tuned.items()}  # fmt: skip
    renamed = {name.replace("multi_modal_projector", "model.multi_modal_projector"): tensor for name, tensor in renamed.items()}
    renamed = {name.replace("language_model.lm_head", "lm_head"): tensor for name, tensor in renamed.items()}
    save_file(renamed, tmp_path / "tuned/model.safetensors", metadata={"format": "pt"})
    check(TaskVector.between(tmp_path / "start", tmp_path / "tuned"), {name: tuned[name].double() - start[name].double() for name in start})
