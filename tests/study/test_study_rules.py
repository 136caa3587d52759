"""The compared methods, controls and candidates: laws they obey and values worked out independently, on models of two blocks."""

import numpy as np
import pytest
import torch
from tiny_models import llama

from lata_lightning.alignment import Alignment, LayerStats
from lata_lightning.errors import LataError
from lata_lightning.linearity.from_vectors import merge_matrices
from lata_lightning.linearity.regression import regress
from lata_lightning.linearity.solving import solve_coefficients
from lata_lightning.numerics.singular import iso_c
from lata_lightning.vectors.projection import project
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import linear_drop_by_rank
from study import layerwise, matrices
from study.cases import Case, summed
from study.methods import FEW_SHOT_TRIALS, block_matrices
from study.rules import CONFIRMED, EVERY_SEED, METHODS, methods_for

BLOCKS = ("model.layers.0", "model.layers.1")


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(weights, seed, by=0.05):
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + by * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}


def batch(seed, rows=4, length=6):
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(0, 24, (rows, length), generator=generator),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
    }


def no_score(weights):
    raise AssertionError("a method that is not tuned looked at validation scores")


def made(start="instruct", experts=3, *, seed=0, score=no_score, tuned=None):
    base = weights_of(llama(0))
    instruct = moved(base, 1, 0.1)
    found = tuple(moved(instruct, 10 + number) for number in range(experts)) if tuned is None else tuple(tuned(instruct))
    return Case(
        {"instruct": instruct, "base": base}[start],
        instruct,
        base,
        found,
        seed,
        [[batch(number)] for number in range(len(found))],
        llama(9).eval(),
        score,
    )


def built(name, case):
    return METHODS[name].build(case)


def flat(delta):
    return np.concatenate([tensor.numpy().reshape(-1) for tensor in delta.values()])


def of_block(delta, block):
    return {name: tensor for name, tensor in delta.items() if name.startswith(block + ".")}


def outside(delta):
    return {name: tensor for name, tensor in delta.items() if not name.startswith(BLOCKS)}


def close(one, other, tolerance=1e-6):
    return set(one) == set(other) and all(torch.allclose(one[name], other[name], rtol=0, atol=tolerance) for name in one)


# The table.


@pytest.mark.parametrize("start", ["instruct", "base"])
def test_every_row_gives_a_finite_difference_for_every_tensor_and_changes_no_model(start):
    case = made(start, score=lambda weights: -float(sum(tensor.square().sum() for tensor in weights.values())))
    before = flat(case.instruct), *(flat(expert) for expert in case.experts)
    for name, method in methods_for(start).items():
        delta = method.build(case)
        assert set(delta) == set(case.instruct), name
        assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in delta.values()), name
        assert all(delta[tensor].shape == case.instruct[tensor].shape for tensor in delta), name
        assert any(tensor.any() for tensor in delta.values()), name
    assert all(map(np.array_equal, before, (flat(case.instruct), *(flat(expert) for expert in case.experts))))


def test_only_rows_that_say_so_look_at_validation_scores():
    tuned = [name for name, method in METHODS.items() if method.tuned]
    assert tuned == ["few-shot from LATA linear", "few-shot from uniform"]
    for name in tuned:
        with pytest.raises(AssertionError, match="looked at validation scores"):
            built(name, made())


def test_rows_that_only_differ_where_experts_started_from_base_are_left_out_elsewhere():
    lone = set(METHODS) - set(methods_for("instruct"))
    anchored = {f"{name}, anchored" for name in ("task arithmetic", "closed form, submodule", "TSV-M", "lata regress without samples")}
    assert lone == {"task arithmetic on instruct", *anchored}
    assert set(methods_for("base")) == set(METHODS)


def test_published_rows_go_onto_the_start_and_lata_onto_instruct():
    case = made("base")
    onto = {name: method.weights(case) for name, method in METHODS.items()}
    assert onto["task arithmetic"] is onto["TIES 0.2"] is onto["closed form, block"] is case.start
    assert onto["LATA linear, block"] is onto["task arithmetic, anchored"] is onto["random log 3"] is case.instruct


def test_a_case_refuses_a_start_that_is_neither_instruct_nor_base():
    case = made()
    strange = Case(case.experts[0], case.instruct, case.base, case.experts, 0, case.calibration, case.model, no_score)
    with pytest.raises(LataError, match="must be its instruct or its base model, and is neither"):
        built("task arithmetic", strange)


# Published methods.


def test_task_arithmetic_of_one_expert_gives_the_expert_back():
    for start in ("instruct", "base"):
        case = made(start, experts=1)
        delta = built("task arithmetic", case)
        assert close({name: case.start[name] + delta[name] for name in delta}, case.experts[0])


def test_lata_is_the_same_however_the_start_of_the_experts_is_given():
    # The same experts, once as tuned − instruct and once as tuned − base, where the instruction vector comes off.
    for name in ("LATA linear, block", "LATA log, submodule", "LATA linear, tensor", "LATA threshold, block"):
        assert close(built(name, made("instruct")), built(name, made("base")))


def test_lata_weights_each_vector_by_its_own_ranks():
    # The first expert moves block 0 more than block 1, the second the other way round; equally well aligned otherwise, more movement ranks last.
    def tuned(instruct):
        for large in BLOCKS:
            yield {
                name: tensor + (0.5 if name.startswith(large) else 0.1 if name.startswith(BLOCKS) else 0)
                for name, tensor in instruct.items()
            }

    case = made(tuned=tuned)
    delta = built("LATA linear, block", case)
    for name in of_block(delta, "model.layers"):
        assert torch.allclose(delta[name], torch.full_like(delta[name], 1 * 0.5 + 0.5 * 0.1), atol=1e-6)
    assert not any(tensor.any() for tensor in outside(delta).values())


@pytest.mark.parametrize(("level", "layers"), [("block", 2), ("submodule", 6), ("tensor", 18)])
def test_lata_ranks_the_layers_of_its_level(level, layers):
    case = made(experts=1)
    delta = built(f"LATA linear, {level}", case)
    coefficients = {name: float((delta[name] / case.vectors[0][name]).median()) for name in of_block(delta, "model.layers")}
    assert sorted({round(coefficient * layers, 3) for coefficient in coefficients.values()}) == list(range(1, layers + 1))


def test_ties_keeps_elects_and_averages_as_worked_out_with_numpy():
    case = made(experts=3)
    vectors = np.stack([flat(vector) for vector in case.vectors]).astype(np.float64)
    for density in (0.2, 0.5):
        kept = np.zeros_like(vectors)
        for row, vector in zip(kept, vectors, strict=True):
            largest = np.argsort(-np.abs(vector))[: int(density * len(vector))]
            row[largest] = vector[largest]
        sign = np.where(kept.sum(0) >= 0, 1, -1)
        agreeing = np.sign(kept) == sign
        expected = (kept * agreeing).sum(0) / np.maximum(agreeing.sum(0), 1)
        assert np.allclose(flat(built(f"TIES {density:g}", case)), expected, atol=1e-6)


def test_dare_is_seeded_by_the_case_and_leaves_the_global_generator_alone():
    cases = [made(seed=seed) for seed in (0, 0, 1)]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, again, other = (flat(built("DARE 0.5", case)) for case in cases)
    assert torch.rand(1) == expected
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_dare_doubles_what_it_keeps_of_one_vector():
    case = made(experts=1)
    vector, kept = flat(case.vectors[0]), flat(built("DARE 0.5", case))
    assert 0.4 < np.mean(kept != 0) < 0.6
    assert np.allclose(kept[kept != 0], 2 * vector[kept != 0])


def test_iso_c_keeps_the_directions_of_the_sum_and_levels_its_singular_values():
    case = made()
    name = "model.layers.0.mlp.up_proj.weight"
    total = sum(vector[name].double() for vector in case.vectors)
    found = built("Iso-C", case)
    values = torch.linalg.svdvals(total)
    assert torch.allclose(torch.linalg.svdvals(found[name].double()), values.mean().expand_as(values), atol=1e-6)
    # totalᵀ · found is the symmetric positive factor of the sum times the mean.
    product = total.T @ found[name].double()
    assert torch.allclose(product, product.T, atol=1e-6)
    assert torch.linalg.eigvalsh(product).min() > 0
    # Outside the blocks and for vectors, the mean.
    for plain in ("lm_head.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.allclose(found[plain], sum(vector[plain] for vector in case.vectors) / 3, atol=1e-6)


def rotation(size, seed):
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def test_iso_cts_with_all_directions_common_is_iso_c():
    vectors = [{"w": torch.randn(8, 6, generator=torch.Generator().manual_seed(task)).double()} for task in range(3)]
    assert torch.equal(matrices.iso_cts(vectors, {"w"}, common=1.0)["w"], iso_c([vector["w"] for vector in vectors]).float())


def test_iso_cts_gives_every_task_a_direction_that_the_common_ones_lack():
    # The sum is dominated by four directions; each task also has one small direction of its own.
    left, right = rotation(6, 0), rotation(6, 1)
    vectors = [{"w": left[:, :4] * 5 @ right[:, :4].T + torch.outer(left[:, 4 + task], right[:, 4 + task])} for task in range(2)]
    found = matrices.iso_cts(vectors, {"w"}, common=4 / 6)["w"].double()
    assert torch.allclose(torch.linalg.svdvals(found), torch.tensor((4 * 10 + 2 * 1) / 6, dtype=torch.float64).expand(6), atol=1e-6)
    for direction in range(6):
        assert left[:, direction] @ found @ right[:, direction] == pytest.approx((4 * 10 + 2 * 1) / 6, abs=1e-6)


def test_the_closed_form_of_one_vector_is_that_vector():
    for name in ("closed form, model", "closed form, block", "closed form, submodule"):
        for start in ("instruct", "base"):
            case = made(start, experts=1)
            assert close(built(name, case), dict(case.vectors[0]), 1e-5), name


def test_the_closed_form_runs_the_start_of_the_experts_and_the_anchored_one_instruct():
    case = made("base", experts=2)
    other = llama(4)
    for name, weights in {"closed form, submodule": case.base, "closed form, submodule, anchored": case.instruct}.items():
        other.load_state_dict(weights)
        vectors = [TaskVector.between(weights, expert) for expert in case.experts]
        expected = solve_coefficients(other, vectors, case.calibration, level="submodule").apply(vectors)
        assert close(built(name, case), summed([vector.pure() for vector in expected]), 1e-5)


def test_the_closed_form_of_a_model_minimises_the_change_of_its_logits():
    # Two equal vectors share the task between them; so does least squares by numpy on the logits themselves.
    case = made(experts=2)
    with torch.no_grad():
        changes = []
        for inputs in case.calibration:
            logits = []
            for weights in (case.instruct, *case.experts):
                case.model.load_state_dict(weights)
                logits.append(case.model(**inputs[0]).logits.double().reshape(-1).numpy())
            changes.append([expert - logits[0] for expert in logits[1:]])
    matrix = np.concatenate([np.stack(found, 1) for found in changes])
    aim = np.concatenate([found[task] for task, found in enumerate(changes)])
    expected, *_ = np.linalg.lstsq(matrix, aim, rcond=None)
    found = built("closed form, model", case)
    name = "model.norm.weight"
    together = torch.stack([vector[name] for vector in case.vectors], 1)
    assert torch.allclose(found[name], together @ torch.tensor(expected, dtype=torch.float32), atol=1e-4)


# Controls.


def test_blocks_only_is_anchored_task_arithmetic_without_the_tensors_outside():
    case = made("base")
    plain, inside = built("task arithmetic, anchored", case), built("blocks only", case)
    assert close(of_block(plain, "model.layers"), of_block(inside, "model.layers"))
    assert any(tensor.any() for tensor in outside(plain).values())
    assert not any(tensor.any() for tensor in outside(inside).values())


def test_tensors_outside_the_blocks_come_whole_where_outside_is_one():
    case = made()
    plain, ranked, both = built("task arithmetic", case), built("LATA log, block", case), built("LATA log, outside 1", case)
    assert close(of_block(ranked, "model.layers"), of_block(both, "model.layers"))
    assert close(outside(plain), outside(both))


def test_anchored_task_arithmetic_counts_the_instruction_vector_off_every_expert():
    case = made("base")
    expected = {name: sum(expert[name] - case.instruct[name] for expert in case.experts) for name in case.instruct}
    assert close(built("task arithmetic, anchored", case), expected)
    doubled = built("task arithmetic on instruct", case)
    assert close(
        {name: doubled[name] - expected[name] for name in doubled},
        {name: 3 * (case.instruct[name] - case.base[name]) for name in doubled},
        1e-5,
    )


def test_linear_and_reversed_ranks_are_complements():
    # r / L + (L + 1 − r) / L = (L + 1) / L, here 3 / 2.
    case = made()
    plain, ranked, turned = (built(name, case) for name in ("blocks only", "LATA linear, block", "reversed linear"))
    assert close({name: ranked[name] + turned[name] for name in plain}, {name: 1.5 * tensor for name, tensor in plain.items()})


def test_ranks_by_depth_give_the_last_or_the_first_block_most():
    case = made()
    plain = built("blocks only", case)
    for name, coefficients in {"by depth, rising": (0.5, 1.0), "by depth, falling": (1.0, 0.5)}.items():
        delta = built(name, case)
        for block, coefficient in zip(BLOCKS, coefficients, strict=True):
            assert close(of_block(delta, block), {each: coefficient * tensor for each, tensor in of_block(plain, block).items()})


def alignment(norms, values=None):
    values = dict.fromkeys(norms, 0.9) if values is None else values
    return Alignment("block", "instruct", {layer: LayerStats(values[layer], norm, norm, 1.0) for layer, norm in norms.items()}, {})


def test_ranks_by_relative_norm_give_the_layer_that_moved_least_the_smallest_coefficient():
    assert linear_drop_by_rank(layerwise.relative_norms(alignment({"a": 0.5, "b": 0.1, "c": 0.3, "d": 0.2}))) == {
        "a": 1.0,
        "b": 0.25,
        "c": 0.75,
        "d": 0.5,
    }


def test_random_ranks_differ_between_rows_experts_and_seeds_and_are_the_same_again():
    layers = [f"layer {index}" for index in range(12)]
    drawn = [linear_drop_by_rank(layerwise.random_values(layers, seed)) for seed in ("0/1/0", "0/2/0", "0/1/1", "1/1/0")]
    assert all(sorted(coefficients.values()) == pytest.approx([rank / 12 for rank in range(1, 13)]) for coefficients in drawn)
    assert len({tuple(coefficients.values()) for coefficients in drawn}) == 4
    case = made()
    rows = [flat(built(f"random linear {number}", case)) for number in range(1, 6)]
    assert any(not np.array_equal(rows[0], row) for row in rows)
    assert np.array_equal(rows[0], flat(built("random linear 1", made())))


# Candidates: coefficients.


def test_values_of_alignments_become_coefficients_of_mean_one():
    found = alignment(dict.fromkeys("abc", 1.0), {"a": 0.6, "b": 0.8, "c": 1.0})
    # Sines 0.8, 0.6 and 0, mean 1.4 / 3; distances 0.4, 0.2 and 0, mean 0.2.
    assert layerwise.sines(found) == pytest.approx({"a": 2.4 / 1.4, "b": 1.8 / 1.4, "c": 0.0})
    assert layerwise.distances(found) == pytest.approx({"a": 2.0, "b": 1.0, "c": 0.0})
    assert layerwise.with_mean_one({"a": 0.0, "b": 0.0}) == {"a": 1.0, "b": 1.0}


def three(*values):
    """Task vectors of a state dict with one block of three entries and one tensor outside."""
    start = {"layers.0.attn.weight": torch.zeros(3), "layers.1.attn.weight": torch.zeros(2), "head.weight": torch.zeros(2)}
    tuned = [{name: torch.tensor(value) for name, value in zip(start, vector, strict=True)} for vector in values]
    return [TaskVector.between(start, each) for each in tuned]


VECTORS = (([1.0, 0.0, 0.0], [1.0, 2.0], [1.0, 0.0]), ([0.6, 0.8, 0.0], [1.0, 2.0], [0.0, 2.0]))
ORDER = ["layers.0", "layers.1", layerwise.OUTSIDE]


def test_own_directions_are_kept_by_solving_the_gram_matrix_of_every_layer():
    found = layerwise.keeping_own_direction(three(*VECTORS), "block")
    # Cosine 0.6: (1 − 0.6) / (1 − 0.36) = 0.625 each; equal vectors: a half each; orthogonal ones: 1.
    for coefficients in found:
        assert list(coefficients) == ORDER
        assert list(coefficients.values()) == pytest.approx([0.625, 0.5, 1.0], abs=1e-5)


def test_layers_that_are_shared_count_less_and_opposite_ones_are_left_alone():
    assert [list(each.values()) for each in layerwise.less_where_shared(three(*VECTORS), "block")] == [
        pytest.approx([1 / 1.6, 0.5, 1.0])
    ] * 2
    opposite = ([-1.0, 0.0, 0.0], [0.0, 0.0], [-1.0, 0.0])
    assert [list(each.values()) for each in layerwise.less_where_shared(three(VECTORS[0], opposite), "block")] == [[1.0, 1.0, 1.0]] * 2


def test_equal_norms_give_every_vector_the_mean_norm_of_a_layer():
    one, other = layerwise.equal_norms(three(*VECTORS), "block")
    # Outside the norms are 1 and 2, mean 1.5.
    assert list(one.values()) == pytest.approx([1.0, 1.0, 1.5])
    assert list(other.values()) == pytest.approx([1.0, 1.0, 0.75])
    nothing = ([0.0, 0.0, 0.0], [1.0, 2.0], [0.0, 2.0])
    assert layerwise.equal_norms(three(VECTORS[0], nothing), "block")[1]["layers.0"] == 1.0


def test_sign_agreement_is_the_share_of_mass_that_does_not_cancel():
    opposed = ([-1.0, 1.0, 0.0], [1.0, 2.0], [-1.0, 0.0])
    one, other = layerwise.agreement(three(VECTORS[0], opposed), "block")
    # Shares 1 / 3, 1 and 0, mean 4 / 9.
    assert list(one.values()) == pytest.approx([0.75, 2.25, 0.0])
    assert one == other


def test_vectors_across_the_instruction_vector_are_orthogonal_to_it_in_every_layer():
    case = made("base")
    for level in ("block", "tensor"):
        for vector in case.anchored:
            found = layerwise.across_instruction(vector, case.instruction, level)
            for names in layerwise.layers_and_outside(vector, level).values():
                inner = sum(float((found[name] * case.instruction[name].double()).sum()) for name in names)
                assert inner == pytest.approx(0, abs=1e-9)
            # What was taken off lies along the instruction vector.
            name = "model.layers.0.mlp.up_proj.weight"
            ratio = (vector[name].double() - found[name]) / case.instruction[name].double()
            assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio), atol=1e-5)


def test_a_layer_along_the_instruction_vector_is_dropped_and_one_against_it_is_kept():
    (vector,) = three(([1.0, 0.0, 0.0], [1.0, 2.0], [0.0, 0.0]))
    (instruction,) = three(([2.0, 0.0, 0.0], [-1.0, -2.0], [1.0, 0.0]))
    assert layerwise.away_from_instruction(vector, instruction, "block") == pytest.approx(dict(zip(ORDER, [0.0, 1.0, 1.0], strict=True)))


@pytest.mark.parametrize("level", ["block", "tensor"])
def test_what_is_compared_as_across_the_instruction_vector_is_what_the_package_makes(level):
    case = made()
    for vector in case.vectors:
        compared = {name: tensor.float() for name, tensor in layerwise.across_instruction(vector, case.instruction, level).items()}
        assert close(compared, dict(project(vector, case.instruction, level=level)))


# Candidates: matrices.


def test_regression_is_that_of_the_package_onto_instruct():
    case = made(experts=2)
    for name, in_order in (("lata regress", True), ("lata regress --in-order false", False)):
        model = llama(3).eval()
        model.load_state_dict(dict(case.instruct))
        expected = regress(case.vectors, model, case.calibration, in_order=in_order)
        delta = built(name, case)
        assert delta.keys() == expected.keys()
        assert all(torch.equal(delta[tensor], expected[tensor]) for tensor in delta)


@pytest.mark.parametrize(
    ("name", "method", "anchored"),
    [
        ("lata regress without samples", "regression", False),
        ("lata regress without samples, anchored", "regression", True),
        ("TSV-M", "tsv", False),
        ("Iso-C", "iso", False),
    ],
)
def test_merges_of_the_vectors_alone_are_those_of_the_package(name, method, anchored):
    case = made("base")
    expected = merge_matrices(case.anchored if anchored else case.vectors, method)
    assert close(built(name, case), dict(expected))
    assert METHODS[name].weights(case) is (case.instruct if anchored else case.start)


def test_regression_of_one_vector_is_that_vector():
    case = made(experts=1)
    delta = built("lata regress", case)
    for tensor in block_matrices(case.vectors[0]):
        assert torch.allclose(delta[tensor], case.vectors[0][tensor], atol=1e-4), tensor


def test_interference_regression_stands_at_the_minimum_of_the_published_loss():
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(5, 4, generator=generator).double() * (task + 1) for task in range(3)]
    found = matrices.interference_regression([{"w": vector} for vector in vectors], {"w"})["w"].double().requires_grad_()
    loss = sum(((found - vector) @ vector.T).square().sum() / vector.square().sum() for vector in vectors)
    (gradient,) = torch.autograd.grad(loss, found)
    start = sum(vectors).requires_grad_()
    before = sum(((start - vector) @ vector.T).square().sum() / vector.square().sum() for vector in vectors)
    assert loss < before
    assert gradient.abs().max() < 1e-4 * torch.autograd.grad(before, start)[0].abs().max()


def test_the_regression_of_equal_vectors_is_that_vector():
    def tuned(instruct):
        expert = moved(instruct, 5)
        return expert, expert

    case = made(tuned=tuned)
    found = built("interference regression", case)
    for name in block_matrices(case.vectors[0]):
        assert torch.allclose(found[name], case.vectors[0][name], atol=1e-4)


# Candidates: few-shot.


def test_few_shot_tuning_scores_forty_models_and_ends_at_the_best_of_them():
    case = made()
    # The best model keeps twice as much of the first block as of the second.
    plain = built("blocks only", case)
    wanted = {name: case.instruct[name] + plain[name] * (0.8 if name.startswith(BLOCKS[0]) else 0.4) for name in plain}
    seen = []

    def score(weights):
        seen.append(-sum(float((weights[name] - wanted[name]).square().sum()) for name in weights))
        return seen[-1]

    case = made(score=score)
    delta = built("few-shot from uniform", case)
    assert len(seen) == FEW_SHOT_TRIALS
    assert max(seen) > max(seen[:5])
    reached = -sum(float((case.instruct[name] + delta[name] - wanted[name]).square().sum()) for name in delta)
    assert reached == pytest.approx(max(seen), rel=1e-4)


def test_few_shot_tuning_begins_at_the_best_scale_of_the_rule():
    case = made(score=lambda weights: 0.0)
    ranked = built("LATA linear, outside 1", case)
    # Of equal scores the first scale tried.
    assert close(built("few-shot from LATA linear", case), {name: 0.2 * tensor for name, tensor in ranked.items()})


def test_seeds_that_confirm_have_every_method_and_control_and_of_the_candidates_the_chosen_ones():
    left_out = set(methods_for("base")) - set(methods_for("base", seed=4))
    assert left_out == {name for name, method in METHODS.items() if method.kind == "candidate"} - set(CONFIRMED)
    assert left_out
    assert set(CONFIRMED) <= set(methods_for("base", seed=4))
    assert methods_for("instruct", seed=100) == methods_for("instruct")


def test_the_first_screen_is_part_of_every_seed_and_a_row_of_no_such_name_is_refused():
    every = methods_for("base", seed=5)
    assert methods_for("base", 5, EVERY_SEED).keys() == set(EVERY_SEED) <= every.keys()
    with pytest.raises(LataError, match=r"unknown row 1: \['TSV'\]; the rows are task arithmetic, "):
        methods_for("base", 5, ["TSV"])


def test_what_is_zero_on_another_vector_stands_at_the_minimum_of_its_loss_and_is_the_vector_where_there_is_no_other():
    generator = torch.Generator().manual_seed(4)
    vector, other = ({"w": torch.randn(3, 5, generator=generator), "b": torch.randn(5, generator=generator)} for _ in range(2))
    found = matrices.zero_on(vector, other)
    own, kept = vector["w"].double(), other["w"].double()
    ridge = (own.T @ own + kept.T @ kept).diagonal().mean()
    solution = found["w"].double().requires_grad_()
    loss = ((solution - own) @ own.T).square().sum() + (solution @ kept.T).square().sum() + ridge * (solution - own).square().sum()
    (gradient,) = torch.autograd.grad(loss, solution)
    assert gradient.abs().max() < 1e-4 * own.square().sum()
    assert torch.equal(found["b"], vector["b"])
    assert torch.allclose(
        matrices.zero_on(vector, {name: torch.zeros_like(tensor) for name, tensor in other.items()})["w"], vector["w"], atol=1e-6
    )
    nothing = {name: torch.zeros_like(tensor) for name, tensor in vector.items()}
    assert not matrices.zero_on(nothing, nothing)["w"].any()
