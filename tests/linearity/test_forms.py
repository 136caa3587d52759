"""Which axis of a stored tensor holds the outputs, beside the modules that transformers makes."""

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lata_lightning.layers import layer_map
from lata_lightning.linearity.forms import MatrixForm, matrix_forms


def forms_of(shapes):
    return matrix_forms(shapes, layer_map(shapes))


def shapes_of(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_linear_layers_of_every_architecture_have_the_sizes_that_their_modules_state(name):
    model = tiny_model(name)
    found = forms_of(shapes_of(model))
    seen = 0
    for path, module in model.named_modules():
        form = found.get(f"{path}.weight")
        if isinstance(module, Conv1D):
            seen += 1
            assert form == MatrixForm(1, module.nf, module.nx, True), path
        elif isinstance(module, nn.Linear) and form is not None:
            seen += 1
            assert form == MatrixForm(1, module.out_features, module.in_features), path
        elif isinstance(module, nn.Embedding) and form is not None:
            assert form.shape == (module.num_embeddings, module.embedding_dim), path
        elif isinstance(module, nn.LayerNorm):
            assert form is None, path
    assert seen >= 4


def test_the_square_conv1d_of_gpt2_is_known_by_the_others_of_its_blocks():
    config = transformers.GPT2Config(vocab_size=8, n_embd=6, n_layer=1, n_head=2, n_positions=8)
    found = forms_of(shapes_of(transformers.GPT2LMHeadModel(config)))
    assert found["transformer.h.0.attn.c_proj.weight"] == MatrixForm(1, 6, 6, True)
    assert found["transformer.wte.weight"] == MatrixForm(1, 8, 6)
    # Without any that is not square, square ones are as everywhere else.
    square = {"layers.0.attn.q.weight": (4, 4), "layers.0.attn.q.bias": (4,), "layers.1.attn.q.weight": (4, 4)}
    assert not any(form.turned for form in forms_of(square).values())


@pytest.mark.parametrize(("gate_up", "down", "turned"), [((3, 8, 5), (3, 5, 4), False), ((3, 5, 8), (3, 4, 5), True)])
def test_fused_experts_are_one_matrix_each_by_the_pair_they_come_in(gate_up, down, turned):
    prefix = "model.layers.0.mlp.experts."
    shapes = {f"{prefix}gate_up_proj": gate_up, f"{prefix}down_proj": down, f"{prefix}gate_up_proj_bias": (3, 8)}
    shapes |= {"model.layers.0.self_attn.q_proj.weight": (5, 5)}
    found = forms_of(shapes)
    assert found[f"{prefix}gate_up_proj"] == MatrixForm(3, 8, 5, turned)
    assert found[f"{prefix}down_proj"] == MatrixForm(3, 5, 4, turned)
    assert f"{prefix}gate_up_proj_bias" not in found


def test_the_experts_of_transformers_are_outputs_by_inputs():
    experts = {"mixtral": "gate_up_proj", "qwen3_moe": "gate_up_proj"}
    for name, leaf in experts.items():
        model = tiny_model(name)
        width = model.config.hidden_size
        found = {path: form for path, form in forms_of(shapes_of(model)).items() if path.endswith(leaf)}
        assert len(found) == 2
        assert all(form.inputs == width and form.count == 4 and not form.turned for form in found.values())


@pytest.mark.parametrize(
    ("name", "shape", "form"),
    [
        ("conv.weight", (8, 3, 4, 4), MatrixForm(1, 8, 48)),
        ("conv.weight", (8, 3, 4), MatrixForm(1, 8, 12)),
        ("conv.weight", (8, 1, 4), None),
        ("embeddings.position_embeddings", (1, 17, 8), None),
        ("embeddings.cls_token", (1, 1, 8), None),
        ("norm.weight", (8,), None),
        ("scale", (), None),
        ("score.weight", (1, 8), MatrixForm(1, 1, 8)),
        ("empty.weight", (0, 8), None),
    ],
)
def test_other_tensors_are_matrices_where_their_outputs_have_inputs_in_common(name, shape, form):
    assert forms_of({name: shape, "layers.0.attn.q.weight": (4, 4), "layers.1.attn.q.weight": (4, 4)}).get(name) == form


def test_a_form_says_its_sizes():
    assert MatrixForm(1, 3, 4).shape == (3, 4)
    assert torch.empty(MatrixForm(2, 3, 4).shape).shape == (3, 4)
