import copy
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from tiny_models import BLOCKS, plus, weights

from lata_lightning.alignment import Alignment, LayerStats, alignment_of, layer_alignment
from lata_lightning.errors import BaseMismatchError, CorruptFileError, LataError, LayoutMismatchError
from lata_lightning.layers import layer_map
from lata_lightning.moments import Moments
from lata_lightning.vectors.aligning import align, check_same_start, measure
from lata_lightning.vectors.metric import LayerAlignment
from lata_lightning.vectors.task_vector import TaskVector

LEVELS = ["block", "submodule", "tensor"]


def zeros():
    return {name: torch.zeros_like(tensor) for name, tensor in weights().items()}


def vector(tensors, **options):
    """A task vector whose tensors are the given ones."""
    return TaskVector.between({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, tensors, **options)


def in_one_piece(tensors, layer):
    """All tensors below a path as one float64 vector, by numpy."""
    return np.concatenate([tensor.double().numpy().reshape(-1) for name, tensor in sorted(tensors.items()) if name.startswith(layer + ".")])


def cosine(one, other):
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


def test_alignment_of_a_block_is_the_cosine_of_its_tensors_as_one_vector():
    task, instruction = weights(1), weights(2)
    found = align(vector(task), vector(instruction, kind="instruction"))
    assert list(found.layers) == list(BLOCKS)
    for block in BLOCKS:
        one, other = in_one_piece(task, block), in_one_piece(instruction, block)
        stats = found.layers[block]
        assert stats.alignment == pytest.approx(cosine(one + other, other), abs=1e-14)
        assert stats.relative_norm == pytest.approx(np.linalg.norm(one) / np.linalg.norm(other), rel=1e-14)
        assert stats.task_norm == pytest.approx(np.linalg.norm(one), rel=1e-14)
        assert stats.instruction_norm == pytest.approx(np.linalg.norm(other), rel=1e-14)
        assert stats.coefficient is None


@pytest.mark.parametrize("ratio", [0.25, 1.0, 3.0])
def test_an_orthogonal_task_vector_is_aligned_by_its_relative_norm_alone(ratio):
    # s = 1/√(1+ρ²), METHODS: 1/√1.0625, 1/√2, 1/√10.
    task, instruction = zeros(), zeros()
    for block in BLOCKS:
        task[f"{block}.mlp.up_proj.weight"][0, 0] = 2 * ratio
        instruction[f"{block}.self_attn.q_proj.weight"][1, 1] = 2.0
    found = align(vector(task), vector(instruction))
    for block in BLOCKS:
        assert found.layers[block].alignment == pytest.approx(1 / math.sqrt(1 + ratio**2), abs=1e-15)
        assert found.layers[block].relative_norm == ratio


def test_a_layer_that_learned_nothing_has_alignment_one():
    found = align(vector(zeros()), vector(weights(2)))
    assert found.values == dict.fromkeys(BLOCKS, 1.0)


def test_where_the_instruction_vector_is_zero_the_alignment_is_absent_and_never_a_number():
    instruction = weights(2)
    for name in instruction:
        if name.startswith(BLOCKS[0]):
            instruction[name].zero_()
    found = align(vector(weights(1)), vector(instruction))
    assert found.undefined == [BLOCKS[0]]
    assert list(found.values) == [BLOCKS[1]]
    assert found.layers[BLOCKS[0]].alignment is None
    assert found.layers[BLOCKS[0]].relative_norm is None


def test_a_task_vector_that_undoes_the_instruction_vector_has_no_alignment():
    found = align(vector(plus(zeros(), weights(2), -1)), vector(weights(2)))
    assert found.undefined == list(BLOCKS)
    assert [found.layers[block].relative_norm for block in BLOCKS] == [1.0, 1.0]


@pytest.mark.parametrize("level", LEVELS)
def test_alignment_ignores_a_common_scale_of_both_vectors(level):
    task, instruction = weights(1), weights(2)
    one = align(vector(task), vector(instruction), level)
    other = align(vector(plus(zeros(), task, 4.0)), vector(plus(zeros(), instruction, 4.0)), level)
    assert one.values == other.values


def test_turning_both_vectors_around_does_not_change_the_alignment():
    task, instruction = weights(1), weights(2)
    one = align(vector(task), vector(instruction))
    other = align(vector(plus(zeros(), task, -1)), vector(plus(zeros(), instruction, -1)))
    assert one.values == other.values


def test_the_more_a_layer_moves_off_the_instruction_vector_the_lower_its_alignment():
    task, instruction = zeros(), zeros()
    for block in BLOCKS:
        task[f"{block}.mlp.up_proj.weight"][0, 0] = 1.0
        instruction[f"{block}.self_attn.q_proj.weight"][0, 0] = 1.0
    values = [align(vector(plus(zeros(), task, factor)), vector(instruction)).values[BLOCKS[0]] for factor in (0, 0.1, 0.5, 1, 2, 10)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 6


@pytest.mark.parametrize("level", ["block", "submodule"])
def test_sums_of_a_layer_are_the_sums_of_its_tensors(level):
    task, instruction = vector(weights(1)), vector(weights(2))
    tensors = align(task, instruction, "tensor").layers
    coarse = align(task, instruction, level).layers
    for layer, names in task.layers.layers(level).items():
        assert coarse[layer].task_norm ** 2 == pytest.approx(sum(tensors[name].task_norm ** 2 for name in names), rel=1e-14)
        assert coarse[layer].instruction_norm ** 2 == pytest.approx(sum(tensors[name].instruction_norm ** 2 for name in names), rel=1e-14)


@pytest.mark.parametrize("level", LEVELS)
def test_every_tensor_is_counted_in_exactly_one_layer_or_outside(level):
    task = weights(1)
    found = align(vector(task), vector(weights(2)), level)
    norms = [stats.task_norm**2 for stats in [*found.layers.values(), *found.outside.values()]]
    everything = np.concatenate([tensor.double().numpy().reshape(-1) for tensor in task.values()])
    assert sum(norms) == pytest.approx(everything @ everything, rel=1e-13)
    assert set(found.outside) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("level", LEVELS)
def test_both_starts_give_one_alignment(level):
    # On a coarse grid every difference is exact, so the two ways round must agree to the last bit.
    base, step = weights(0, step=2**-8), 2**-8
    instruct = plus(base, weights(1, spread=0.1, step=step))
    from_instruct = plus(instruct, weights(2, spread=0.2, step=step))
    instruction = TaskVector.between(base, instruct, kind="instruction")
    one = align(TaskVector.between(instruct, from_instruct), instruction, level)
    other = align(TaskVector.between(base, from_instruct, start_kind="base"), instruction, level)
    assert (one.start, other.start) == ("instruct", "base")
    assert one.layers == other.layers
    assert one.outside == other.outside


def test_the_start_can_be_said_against_the_manifest():
    base, instruct, tuned = weights(0), weights(1), weights(2)
    instruction = TaskVector.between(base, instruct, kind="instruction")
    unlabelled = TaskVector.between(base, tuned)
    assert (
        align(unlabelled, instruction, start="base").values == align(TaskVector.between(base, tuned, start_kind="base"), instruction).values
    )


def test_aligning_changes_neither_vector():
    task, instruction = vector(weights(1)), vector(weights(2))
    align(task, instruction)
    assert all(torch.equal(task[name], tensor) for name, tensor in weights(1).items())
    assert all(torch.equal(instruction[name], tensor) for name, tensor in weights(2).items())


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


def test_vectors_over_other_tensors_are_refused_with_their_names():
    short = weights(1)
    del short["lm_head.weight"]
    with pytest.raises(
        LayoutMismatchError, match=r"same tensors; on one side only are 1: \['lm_head.weight'\]. Were both made from one base model"
    ):
        align(vector(short), vector(weights(2)))


def test_vectors_of_other_sizes_are_refused_with_both_shapes():
    with pytest.raises(
        LayoutMismatchError, match=r"different are 2: \['lm_head.weight', 'model.embed_tokens.weight'\].*\(6, 4\) and \(9, 4\)"
    ):
        align(vector(weights(1)), vector(weights(2, vocabulary=9)))


def test_an_unknown_level_or_start_is_refused():
    with pytest.raises(LataError, match="unknown level 'head'"):
        align(vector(weights(1)), vector(weights(2)), "head")
    with pytest.raises(LataError, match="unknown start 'raw'"):
        align(vector(weights(1)), vector(weights(2)), start="raw")
    with pytest.raises(LataError, match="unknown start 'raw'"):
        alignment_of({}, layer_map([]), start="raw")


@pytest.mark.parametrize("side", [0, 1])
def test_weights_that_are_not_finite_are_refused_by_name(side):
    pair = [weights(1), weights(2)]
    pair[side]["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    with pytest.raises(CorruptFileError, match=r"NaN or infinite values in 1: \['model.layers.1.mlp.up_proj.weight'\]"):
        measure(vector(pair[0]), vector(pair[1]))


@pytest.fixture
def saved(tmp_path):
    """Saved vectors know which weights they belong to."""
    base, instruct, stranger = weights(0), weights(1), weights(9)

    def save(name, start, tuned, **options):
        return TaskVector.between(start, tuned, **options).save(tmp_path / name)

    return {
        "instruction": save("instruction", base, instruct, kind="instruction"),
        "from instruct": save("from-instruct", instruct, weights(2)),
        "also from instruct": save("also", instruct, weights(3)),
        "from base": save("from-base", base, weights(2), start_kind="base"),
        "from stranger": save("from-stranger", stranger, weights(2)),
    }


def test_an_instruction_vector_of_other_weights_is_refused(saved):
    with pytest.raises(BaseMismatchError, match="are different weights.*say so .*--start"):
        align(saved["from stranger"], saved["instruction"])
    with pytest.raises(BaseMismatchError, match="If the fine-tune started from base, say so"):
        align(saved["from base"], saved["instruction"], start="instruct")
    with pytest.raises(BaseMismatchError, match="If the fine-tune started from instruct, say so"):
        align(saved["from instruct"], saved["instruction"], start="base")
    for name in ("from instruct", "from base"):
        assert align(saved[name], saved["instruction"]).values


def test_the_check_of_the_instruction_vector_can_be_switched_off(saved):
    assert align(saved["from stranger"], saved["instruction"], check_base=False).values


def test_an_instruction_vector_of_unknown_weights_passes_and_so_does_a_task_vector_of_unknown_start(saved):
    assert align(saved["from instruct"], vector(weights(5), kind="instruction")).values
    assert align(vector(weights(5)), saved["instruction"]).values


def test_vectors_from_different_starts_are_refused_and_unknown_starts_pass(saved):
    check_same_start([saved["from instruct"], saved["also from instruct"], vector(weights(5))])
    with pytest.raises(BaseMismatchError, match=r"no common origin.*check_base=False"):
        check_same_start([saved["from instruct"], saved["also from instruct"], saved["from stranger"]])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("start", ["instruct", "base"])
def test_the_metric_equals_the_function(level, start):
    task, instruction = weights(1), weights(2)
    expected = align(vector(task), vector(instruction), level, start).values
    metric = LayerAlignment(layer_map(task), level, start)
    metric.update(task, instruction)
    found = metric.compute()
    assert list(found) == list(expected)
    assert {layer: value.item() for layer, value in found.items()} == pytest.approx(expected, abs=1e-15)
    assert all(value.dtype == torch.float64 and value.dim() == 0 for value in found.values())


def halves(tensors):
    return [{name: tensor.reshape(-1)[part] for name, tensor in tensors.items()} for part in (slice(0, 3), slice(3, None))]


def test_the_metric_adds_up_over_batches_of_tensors_and_over_shards():
    task, instruction = weights(1), weights(2)
    expected = align(vector(task), vector(instruction)).values
    by_tensor = LayerAlignment(layer_map(task))
    for name in task:
        by_tensor.update({name: task[name]}, {name: instruction[name]})
    by_shard = LayerAlignment(layer_map(task))
    for one, other in zip(halves(task), halves(instruction), strict=True):
        by_shard.update(one, other)
    for metric in (by_tensor, by_shard):
        assert {layer: value.item() for layer, value in metric.compute().items()} == pytest.approx(expected, abs=1e-14)


def test_states_of_two_ranks_reduce_by_summing():
    task, instruction = weights(1), weights(2)
    ranks = [LayerAlignment(layer_map(task)) for _ in range(2)]
    for rank, one, other in zip(ranks, halves(task), halves(instruction), strict=True):
        rank.update(one, other)
    reduce = ranks[0]._reductions["sums"]
    assert reduce is torch.sum or reduce.__name__ == "dim_zero_sum"
    reduced = reduce(torch.stack([rank.sums for rank in ranks]))
    merged = copy.deepcopy(ranks[0])
    merged.merge_state(ranks[1])
    assert torch.equal(merged.sums, reduced)
    expected = align(vector(task), vector(instruction)).values
    assert {layer: value.item() for layer, value in merged.compute().items()} == pytest.approx(expected, abs=1e-14)


def test_a_reset_metric_has_forgotten_everything():
    task, instruction = weights(1), weights(2)
    metric = LayerAlignment(layer_map(task))
    metric.update(weights(5), weights(6))
    metric.compute()
    metric.reset()
    metric.update(task, instruction)
    fresh = LayerAlignment(layer_map(task))
    fresh.update(task, instruction)
    assert metric.compute() == fresh.compute()


def test_calling_the_metric_gives_the_value_of_the_batch_and_adds_it_to_the_state():
    task, instruction = weights(1), weights(2)
    metric = LayerAlignment(layer_map(task))
    first, second = ((one, other) for one, other in zip(halves(task), halves(instruction), strict=True))
    metric(*first)
    of_batch = metric(*second)
    alone = LayerAlignment(layer_map(task))
    alone.update(*second)
    assert of_batch == alone.compute()
    expected = align(vector(task), vector(instruction)).values
    assert {layer: value.item() for layer, value in metric.compute().items()} == pytest.approx(expected, abs=1e-14)


def test_a_metric_survives_pickling_in_the_middle_of_its_work():
    task, instruction = weights(1), weights(2)
    (one, other), rest = zip(halves(task), halves(instruction), strict=True)
    metric = LayerAlignment(layer_map(task))
    metric.update(one, other)
    metric = pickle.loads(pickle.dumps(metric))  # noqa: S301
    metric.update(*rest)
    expected = align(vector(task), vector(instruction)).values
    assert {layer: value.item() for layer, value in metric.compute().items()} == pytest.approx(expected, abs=1e-14)


def test_the_metric_keeps_float64_sums_when_it_is_cast_with_its_model():
    metric = LayerAlignment(layer_map(weights())).half()
    metric.update(weights(1), weights(2))
    assert metric.sums.dtype == torch.float64


def test_the_metric_passes_over_tensors_outside_the_layers():
    task = weights(1)
    metric = LayerAlignment(layer_map(task))
    metric.update({"lm_head.weight": task["lm_head.weight"]}, {"lm_head.weight": task["lm_head.weight"]})
    assert metric.compute() == {}


def test_the_metric_refuses_tensors_on_one_side_only_and_other_shapes():
    metric = LayerAlignment(layer_map(weights()))
    with pytest.raises(LayoutMismatchError, match=r"same names; on one side only are 1: \['b'\]"):
        metric.update({"a": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)})
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(LayoutMismatchError, match=r"got \(8, 4\) and \(4, 8\)"):
        metric.update({name: torch.zeros(8, 4)}, {name: torch.zeros(4, 8)})


def test_the_metric_refuses_sums_that_are_not_finite():
    task = weights(1)
    task["model.layers.0.mlp.up_proj.weight"][0, 0] = math.inf
    metric = LayerAlignment(layer_map(task))
    metric.update(task, weights(2))
    with pytest.raises(CorruptFileError, match=r"\['model.layers.0'\]"):
        metric.compute()


# --- what a ranking is worth ---------------------------------------------------------------------------------------------------------------


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
