"""Names of tensors: what wrappers and older releases made of them, and prefixes that one of two models has."""

import pytest

from lata_lightning.errors import LataError, LayoutMismatchError
from lata_lightning.layers import unwrapped
from lata_lightning.store.names import LeaveOut, current_spelling, differing_prefixes, keyed, leave_out_pattern


@pytest.mark.parametrize(
    ("wrapped", "clean"),
    [
        ("_orig_mod.model.layers.0.mlp.weight", "model.layers.0.mlp.weight"),
        ("model._orig_mod.layers.0.mlp.weight", "model.layers.0.mlp.weight"),
        ("model.layers.0._checkpoint_wrapped_module.mlp.weight", "model.layers.0.mlp.weight"),
        ("_fsdp_wrapped_module.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.weight", "layers.0.weight"),
        ("layers.0.module_orig_modular.weight", "layers.0.module_orig_modular.weight"),
    ],
)
def test_components_of_wrappers_are_taken_off(wrapped, clean):
    assert unwrapped(wrapped) == clean


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("bert.encoder.LayerNorm.gamma", "bert.encoder.LayerNorm.weight"),
        ("bert.encoder.LayerNorm.beta", "bert.encoder.LayerNorm.bias"),
        ("encoder.conv.weight_g", "encoder.conv.parametrizations.weight.original0"),
        ("encoder.conv.weight_v", "encoder.conv.parametrizations.weight.original1"),
        ("layer_scale.gamma", "layer_scale.gamma"),
    ],
)
def test_old_endings_are_spelled_as_today(old, new):
    assert current_spelling(old) == new


def test_two_names_of_one_tensor_are_refused():
    with pytest.raises(LayoutMismatchError, match=r"x must hold each tensor once; under a second name are 1: \['_orig_mod.a'\]"):
        keyed(["a", "_orig_mod.a"], "x")


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (["a.x", "a.y"], ["a.x", "a.y"], ("", "")),
        (["model.a.x", "model.b", "loss.w"], ["a.x", "b"], ("model.", "")),
        (["a.x", "b"], ["bert.a.x", "bert.b", "head"], ("", "bert.")),
        (["model.h.0", "model.h.1"], ["transformer.h.0", "transformer.h.1", "lm_head"], ("model.", "transformer.")),
        # A module of the same name beside the model misleads nobody.
        (["norm", "model.a", "model.norm"], ["a", "norm"], ("model.", "")),
        # The larger of two copies is the one that is meant.
        (["student.a", "teacher.a", "teacher.b"], ["a", "b"], ("teacher.", "")),
        (["x.weight", "y.weight"], ["p.q", "r.s", "t.u"], ("", "")),
    ],
)
def test_the_prefix_is_that_which_brings_most_names_together(one, other, expected):
    assert differing_prefixes(one, other, "it") == expected


def test_two_equal_copies_of_a_model_are_refused():
    with pytest.raises(LayoutMismatchError, match=r"it must hold the model once; .* under each of 2: \['actor.', 'critic.'\]"):
        differing_prefixes(["actor.a", "actor.b", "critic.a", "critic.b"], ["a", "b"], "it")


def test_names_that_agree_win_over_a_second_copy_under_a_prefix():
    assert differing_prefixes(["a", "b", "ema.a", "ema.b"], ["a", "b"], "it") == ("", "")


def test_the_pattern_to_leave_out_covers_the_heads_and_nothing_else():
    pattern = leave_out_pattern(["classifier.weight", "classifier.bias", "cls.predictions.bias"], ["bert.encoder.layer.0.w"])
    leave_out = LeaveOut([pattern])
    assert all(leave_out(name) for name in ("classifier.weight", "cls.predictions.bias"))
    assert not any(leave_out(name) for name in ("bert.encoder.layer.0.w", "bert.classifier.w"))
    assert leave_out_pattern(["vit.pooler.dense.weight"], ["vit.encoder.w"]) == r"^vit\.pooler\."
    assert leave_out_pattern(["logit_scale"], ["a.w"]) == "^logit_scale$"


def test_a_head_may_be_a_numbered_list():
    trunk = [f"resnet.encoder.stages.{number}.weight" for number in range(4)]
    assert leave_out_pattern(["classifier.1.weight", "classifier.1.bias"], trunk) == r"^classifier\."
    assert leave_out_pattern(["heads.0.weight", "heads.1.weight"], trunk) == r"^heads\."


def test_layers_are_no_heads():
    assert leave_out_pattern([f"layers.{number}.weight" for number in range(4)], ["embedding.weight", "norm.weight"]) is None
    assert leave_out_pattern(["model.layers.3.mlp.weight"], ["model.layers.2.mlp.weight"]) is None
    assert leave_out_pattern(["a.w"], []) is None


def test_a_wrong_pattern_is_refused():
    with pytest.raises(LataError, match=r"must be a regular expression; '\[' is none"):
        LeaveOut(["["])
    with pytest.raises(LataError, match="must not be empty"):
        LeaveOut([""])
    with pytest.raises(LataError, match=r"must match a tensor name of it; without a match are 1: \['hed'\]"):
        LeaveOut(["head", "hed"]).check_used(["head.weight"], "it")
