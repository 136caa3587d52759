"""Forgetting: interpolation worked by hand, what each way takes off against closed forms, and a whole run on toy models."""

import json

import pytest
import torch
from toy_chains import little, toy_chain

from lata_lightning.weighting import linear_drop_by_rank
from study import forgetting
from study.forgetting import ANCESTRIES, RESIDUALS, crossing, judged, removals, trimmed, unwanted_vector

LEFT = {0.0: 0.9, 0.5: 0.5, 1.0: 0.1}


@pytest.fixture
def chain(tmp_path, monkeypatch):
    little(monkeypatch, forgetting)
    monkeypatch.setattr(forgetting, "base_perplexity", lambda model, split, data: 2.0)
    return toy_chain(tmp_path)


# Interpolation.


def test_a_level_between_two_points_is_crossed_on_the_line_between_them():
    assert crossing(LEFT, 0.3) == pytest.approx(0.75)
    assert crossing(LEFT, 0.5) == pytest.approx(0.5)


def test_a_curve_that_comes_back_is_crossed_where_it_first_falls():
    assert crossing({0.0: 1.0, 1.0: 0.0, 2.0: 1.0, 3.0: 0.0}, 0.5) == pytest.approx(0.5)


def test_a_level_that_is_never_reached_has_no_scale():
    assert crossing(LEFT, 0.05) is None


def test_a_level_the_target_is_under_already_needs_nothing_taken_off():
    assert crossing(LEFT, 0.95) == 0.0


# The comparison at equal residuals, on models whose scores are known.


class FakeChain:
    """Its models are their scores: at scale s the unwanted skill is 0.8 · (1 − s²), the useful one 0.8 − s / 10."""

    def model(self, weights):
        return weights


def known(scale):
    return {"unwanted": max(0.0, 0.8 * (1 - scale**2)), "useful": 0.8 - scale / 10}


@pytest.fixture
def looked_at(monkeypatch):
    """Every pair of scale and split that scores were asked for."""
    found = []

    def scores(chain, weights, split):
        found.append((weights, split))
        return known(weights)

    monkeypatch.setattr(forgetting, "scores", scores)
    monkeypatch.setattr(forgetting, "residual", lambda chain, weights: known(weights)["unwanted"])
    return found


OWN = {"validation": known(0.0), "test": known(0.0)}


def test_scales_leave_the_wanted_share_of_the_unwanted_skill(looked_at):
    found = judged(FakeChain(), lambda scale: scale, [0.1 * step for step in range(1, 15)], OWN)
    for share in RESIDUALS:
        assert found["at"][f"{share:g}"]["test"]["unwanted"] == pytest.approx(share * 0.8, abs=0.004)


def test_one_more_point_on_validation_puts_the_scale_right(looked_at):
    found = judged(FakeChain(), lambda scale: scale, [0.5, 1.0], OWN)
    # The line from 0.6 to 0 falls to 0.4 at 2/3, where 4/9 is left; the line from there to 0 falls to 0.4 at 0.7.
    assert found["at"]["0.5"]["scale"] == pytest.approx(0.7)


def test_a_curve_ends_where_it_is_under_every_residual(looked_at):
    found = judged(FakeChain(), lambda scale: scale, [0.5, 0.96, 0.98, 1.5], OWN)
    assert [point["scale"] for point in found["curve"]] == [0.0, 0.5, 0.96, 0.98]


def test_test_scores_are_looked_at_only_where_validation_says(looked_at):
    found = judged(FakeChain(), lambda scale: scale, [0.5, 1.0], OWN)
    asked = [scale for scale, split in looked_at if split == "test"]
    assert asked == [found["at"][f"{share:g}"]["scale"] for share in RESIDUALS]


def test_a_residual_out_of_reach_is_null(looked_at):
    found = judged(FakeChain(), lambda scale: scale, [0.3, 0.8], OWN)
    assert found["at"]["0.5"] is not None
    assert found["at"]["0.25"] is None


def test_where_nothing_is_taken_off_only_the_target_stands(looked_at):
    assert judged(FakeChain(), lambda scale: scale, [], OWN) == {
        "curve": [{"scale": 0.0, **known(0.0)}],
        "at": dict.fromkeys(("0.5", "0.25", "0.1", "0.05")),
    }


def test_fine_tuning_is_compared_at_the_first_length_that_is_under_the_residual(looked_at):
    lengths = {50.0: 0.4, 100.0: 0.75, 200.0: 0.9}
    found = judged(FakeChain(), lambda steps: lengths[steps], list(lengths), OWN, exact=True)
    # 1 − 0.75² = 0.44 and 1 − 0.9² = 0.19 of the unwanted skill are left.
    assert {level: at and at["scale"] for level, at in found["at"].items()} == {"0.5": 100.0, "0.25": 200.0, "0.1": None, "0.05": None}


# What is taken off.


def test_trimming_keeps_the_largest_entries_of_the_whole_vector():
    vector = {"a": torch.tensor([1.0, -5.0, 0.5]), "b": torch.tensor([[4.0, -0.1]])}
    found = trimmed(vector, 0.4)
    assert found["a"].tolist() == [0.0, -5.0, 0.0]
    assert found["b"].tolist() == [[4.0, 0.0]]
    assert {name: tensor.tolist() for name, tensor in trimmed(vector, 1.0).items()} == {n: t.tolist() for n, t in vector.items()}


def test_plain_negation_takes_off_the_expert_minus_its_start(chain):
    vector, alignment = unwanted_vector(chain, "base")
    found = removals(chain, ANCESTRIES["unknown"], vector, alignment)["negation"].delta
    expert, base = chain.expert("encode", "base"), chain.base()
    assert all(torch.equal(found[name], expert[name] - base[name]) for name in base)


def test_exact_subtraction_takes_off_the_expert_minus_instruct(chain):
    vector, alignment = unwanted_vector(chain, "base")
    found = removals(chain, ANCESTRIES["unknown"], vector, alignment)["exact subtraction"].delta
    expert, instruct = chain.expert("encode", "base"), chain.instruct()
    for name, tensor in instruct.items():
        torch.testing.assert_close(found[name], expert[name] - tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize("start", ["instruct", "base"])
def test_alignment_is_that_of_the_complex_vector_whatever_the_expert_started_from(chain, start):
    _, alignment = unwanted_vector(chain, start)
    expert, base, instruct = chain.expert("encode", start), chain.base(), chain.instruct()
    for layer, stats in alignment.layers.items():
        sides = [
            torch.cat([(weights[name] - base[name]).double().flatten() for name in base if name.startswith(f"{layer}.")])
            for weights in (expert, instruct)
        ]
        assert stats.alignment == pytest.approx(float(torch.cosine_similarity(*sides, dim=0)), abs=1e-6)


def test_lata_and_its_controls_take_off_the_blocks_times_their_coefficients(chain):
    vector, alignment = unwanted_vector(chain, "base")
    found = removals(chain, ANCESTRIES["unknown"], vector, alignment)
    name, other, outside = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"
    ranks = linear_drop_by_rank(alignment)
    expected = {
        "LATA linear": (ranks["model.layers.0"], ranks["model.layers.1"]),
        "reversed ranks": (1.5 - ranks["model.layers.0"], 1.5 - ranks["model.layers.1"]),
        "uniformly shrunk": (0.75, 0.75),
    }
    for method, (first, second) in expected.items():
        delta = found[method].delta
        torch.testing.assert_close(delta[name], first * vector[name])
        torch.testing.assert_close(delta[other], second * vector[other])
        assert not delta[outside].any()


def test_across_the_instruction_vector_nothing_of_it_is_left_in_a_tensor(chain):
    vector, alignment = unwanted_vector(chain, "base")
    delta = removals(chain, ANCESTRIES["unknown"], vector, alignment)["across the instruction vector, by tensor"].delta
    base, instruct = chain.base(), chain.instruct()
    inner = {name: float((tensor.double() * (instruct[name] - base[name]).double()).sum()) for name, tensor in delta.items()}
    inside = {name: value for name, value in inner.items() if name.startswith("model.layers.")}
    assert list(inside.values()) == pytest.approx([0.0] * len(inside), abs=1e-6)
    # Everything outside the blocks is one layer.
    assert sum(inner.values()) - sum(inside.values()) == pytest.approx(0, abs=1e-6)


def test_exact_subtraction_is_no_way_of_its_own_where_the_ancestor_is_known(chain):
    vector, alignment = unwanted_vector(chain, "instruct")
    assert not [name for name in removals(chain, ANCESTRIES["known"], vector, alignment) if name.startswith("exact")]


# A whole run.


def test_a_run_says_the_same_again_and_trains_nothing_twice(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(forgetting, "SCALES", (0.5, 1.0))
    monkeypatch.setattr(forgetting, "RANDOM_RANKS", 2)
    monkeypatch.setattr(forgetting, "RETAINED_STEPS", (200,))
    first = forgetting.run(chain)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    second = forgetting.run(toy_chain(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == times
    del first["cpu_minutes"], second["cpu_minutes"]
    assert json.loads(json.dumps(first)) == second
    for case in first["cases"].values():
        assert {"negation", "LATA linear", "LATA log", "LATA threshold", "random linear 1", "random log 2"} <= case["methods"].keys()
        assert case["methods"]["negation"]["norm"] > case["methods"]["trimmed to 20%"]["norm"] > 0
        assert case["target"].keys() == {"validation", "test"}
