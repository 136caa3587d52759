import math
import sys

import numpy as np
import pytest
import torch
from tiny_models import BLOCKS, weights

from lata_lightning.alignment import Alignment, LayerStats, alignment_of, layer_alignment
from lata_lightning.errors import LataError
from lata_lightning.layers import layer_map
from lata_lightning.moments import Moments
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.task_vector import TaskVector


def zeros():
    return {name: torch.zeros_like(tensor) for name, tensor in weights().items()}


def vector(tensors, **options):
    """A task vector whose tensors are the given ones."""
    return TaskVector.between({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, tensors, **options)


def test_a_layer_alignment_is_absent_where_it_is_undefined():
    assert layer_alignment({"a": Moments(0.0, 9.0, 16.0), "b": Moments(0.0, 1.0, 0.0)}) == {"a": pytest.approx(0.8)}


def test_a_table_of_moments_is_grouped_by_layer():
    names = ["model.layers.0.self_attn.w", "model.layers.0.mlp.w", "lm_head.weight"]
    table = {names[0]: Moments(1.0, 2.0, 3.0), names[1]: Moments(-1.0, 7.0, 13.0), names[2]: Moments(0.0, 4.0, 0.0)}
    found = alignment_of(table, layer_map(names))
    # Together ⟨⟩ = 0, ‖τ‖² = 9, ‖τ_instr‖² = 16.
    assert found.layers == {"model.layers.0": LayerStats(pytest.approx(0.8), 0.75, 3.0, 4.0)}
    assert found.outside == {"lm_head.weight": LayerStats(None, None, 2.0, 0.0)}


def test_an_alignment_survives_json():
    import json

    found = align(vector(weights(1)), vector(weights(2)), "submodule")
    found = found.with_coefficients(dict.fromkeys(found.layers, 0.5), outside=0.25)
    back = Alignment.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert back == found
    assert {stats.coefficient for stats in back.layers.values()} == {0.5}
    assert {stats.coefficient for stats in back.outside.values()} == {0.25}


def test_an_undefined_alignment_is_null_in_json():
    found = align(vector(weights(1)), vector(zeros()))
    assert [layer["alignment"] for layer in found.to_json()["layers"].values()] == [None, None]


def test_coefficients_can_be_taken_off_again():
    found = align(vector(weights(1)), vector(weights(2)))
    assert found.with_coefficients(dict.fromkeys(BLOCKS, 0.5), 1.0).with_coefficients(None) == found


def test_a_coefficient_for_every_layer_is_needed():
    with pytest.raises(KeyError, match="model.layers.1"):
        align(vector(weights(1)), vector(weights(2))).with_coefficients({BLOCKS[0]: 1.0})


def ranked(alignments, norms):
    layers = {f"h.{number}": LayerStats(one, norm, 1.0, 1.0) for number, (one, norm) in enumerate(zip(alignments, norms, strict=True))}
    return Alignment("block", "instruct", layers, {})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("grid", [None, 3])
def test_the_rank_correlation_is_that_of_scipy_also_with_ties(seed, grid):
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(seed).normal(size=(2, 12))
    if grid is not None:
        values = np.round(values * grid) / grid
    expected = stats.spearmanr(values[0], -values[1]).statistic
    assert ranked(*values.tolist()).norm_correlation == pytest.approx(expected, abs=1e-12)


def test_a_ranking_by_relative_norm_is_recognised_in_either_direction():
    # cos = 1 / √(1 + ρ²) where task vector and instruction vector are orthogonal: the smaller ρ, the better aligned.
    norms = [0.1, 0.4, 0.2, 0.8, 0.6]
    by_norm = ranked([1 / math.sqrt(1 + norm**2) for norm in norms], norms)
    assert by_norm.norm_correlation == pytest.approx(1)
    assert by_norm.by_relative_norm
    assert by_norm.cautions() == ["The ranking is one by relative norm: the rank correlation of alignment with −relative norm is 1.00."]
    turned = ranked(norms, norms)
    assert turned.norm_correlation == pytest.approx(-1)
    assert turned.by_relative_norm


def test_a_ranking_of_its_own_is_not_called_one_by_relative_norm():
    # Ranks 1 2 3 4 5 against 2 1 4 3 5: Σ d² = 4, ρ = 1 − 6 · 4 / (5 · 24) = 0.8.
    found = ranked([0.1, 0.2, 0.3, 0.4, 0.5], [-2.0, -1.0, -4.0, -3.0, -5.0])
    assert found.norm_correlation == pytest.approx(0.8)
    assert not found.by_relative_norm
    assert found.cautions() == []


def test_three_layers_are_too_few_to_call_a_ranking_one_by_relative_norm():
    found = ranked([0.9, 0.6, 0.3], [0.1, 0.2, 0.3])
    assert found.norm_correlation == pytest.approx(1)
    assert not found.by_relative_norm


def test_a_rank_correlation_needs_two_layers_that_differ():
    assert ranked([0.5], [0.1]).norm_correlation is None
    assert ranked([], []).norm_correlation is None
    assert ranked([0.5, 0.5], [0.1, 0.2]).norm_correlation is None
    assert ranked([0.5, None, 0.25], [0.1, None, 0.2]).norm_correlation == pytest.approx(1)


def test_both_cautions_are_given_and_carried_by_json():
    found = ranked([0.91, 0.92, 0.93, 0.94], [0.4, 0.3, 0.2, 0.1])
    assert [sentence.split()[1] for sentence in found.cautions()] == ["alignments", "ranking"]
    assert found.ranking() == {
        "alignment_spread": pytest.approx(0.03),
        "alignment_too_flat_to_rank": True,
        "alignment_norm_correlation": pytest.approx(1),
        "alignment_ranks_by_relative_norm": True,
    }


def alignments(*values, norm=1.0):
    return Alignment("block", "instruct", {f"h.{number}": LayerStats(value, 0.5, norm, 2.0) for number, value in enumerate(values)}, {})


def test_a_plot_shows_every_alignment_in_order_as_torchmetrics_does():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = alignments(0.9, 0.2, 0.5).plot()
    (line,) = axes.get_lines()
    assert list(line.get_ydata()) == [0.9, 0.2, 0.5]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["h.0", "h.1", "h.2"]
    assert (axes.get_ylabel(), line.get_color()) == ("alignment", "C0")
    given, panel = pyplot.subplots()
    assert alignments(0.9, 0.2).plot(panel) == (given, panel)
    pyplot.close(figure)
    pyplot.close(given)


def test_a_plot_is_grey_where_nothing_can_be_ranked_and_shows_norms_where_nothing_is_aligned():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots()
    alignments(0.90, 0.91).plot(axes)
    assert (axes.get_lines()[0].get_color(), axes.get_title()) == ("0.5", "too flat to rank by")
    axes.clear()
    alignments(None, None, norm=3.0).plot(axes)
    assert (list(axes.get_lines()[0].get_ydata()), axes.get_ylabel()) == ([3.0, 3.0], "task norm")
    pyplot.close(figure)


def test_a_layer_that_did_not_move_is_no_point_of_a_plot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots()
    found = alignments(0.9, 1.0, 0.2)
    Alignment("block", "instruct", {**found.layers, "h.1": LayerStats(1.0, 0.0, 0.0, 2.0)}, {}).plot(axes)
    assert list(axes.get_lines()[0].get_xdata()) == [0, 2]
    pyplot.close(figure)


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LataError, match=r"a plot needs matplotlib, which is not installed: pip install 'lata_lightning\[report\]'"):
        alignments(0.9, 0.2).plot()
