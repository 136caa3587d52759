import math
from dataclasses import replace

import pytest
import torch
from tiny_models import llama
from torch.nn.utils import parameters_to_vector

from lata_lightning.errors import LataError, LayoutMismatchError, WeightingError
from lata_lightning.evaluation.curves import Tuning, mean_score
from lata_lightning.evaluation.tuning import tune, under_rules
from lata_lightning.merging.merge import Term
from lata_lightning.report.reading import read_scales
from lata_lightning.store.writer import write_json
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import linear_drop_by_rank


@pytest.fixture
def model():
    return llama()


@pytest.fixture
def vector(model):
    return TaskVector.between(model, llama(1))


@pytest.fixture
def instruction(model):
    return TaskVector.between(llama(2), model, kind="instruction")


def moved(model, start):
    """How far the weights are from the start, in units of the vector between the first two models."""
    length = (parameters_to_vector(llama(1).parameters()) - start).norm()
    return ((parameters_to_vector(model.parameters()) - start).norm() / length).item()


def along(model, curve):
    """A score that depends on how far the model has moved."""
    start = parameters_to_vector(model.parameters()).detach().clone()
    return lambda now: curve(moved(now, start))


def test_the_best_scale_is_found_and_the_model_is_itself_again(model, vector):
    before = parameters_to_vector(model.parameters()).clone()
    score = along(model, lambda distance: 1 - abs(distance - 0.5))
    found = tune(model, {"none": [vector]}, {"skill": score}, grid=(1, 0.25, 0.5))
    assert [point.scale for point in found.points] == [0, 0.25, 0.5, 1]
    assert [point.scores["skill"] for point in found.points] == pytest.approx([0.5, 0.75, 1, 0.5], abs=1e-5)
    assert (found.best.weighting, found.best.scale) == ("none", 0.5)
    assert (found.best.score, found.best.start_score) == pytest.approx((1, 0.5), abs=1e-5)
    assert torch.equal(parameters_to_vector(model.parameters()), before)


def test_several_vectors_share_the_scale(model, vector):
    score = along(model, lambda distance: distance)
    found = tune(model, {"none": [vector, vector]}, {"skill": score}, grid=(0.5,))
    assert [point.scores["skill"] for point in found.points] == pytest.approx([0, 1], abs=1e-5)


def test_the_rule_is_chosen_too_and_the_smaller_scale_wins_a_tie(model, vector):
    halved = TaskVector(
        vector.tensors, replace(vector.manifest, coefficients=dict.fromkeys(vector.layers.layers("block"), 0.5), outside=0.5)
    )
    score = along(model, lambda distance: 1.0 if distance > 0.4 else 0.0)
    rules = {"halved": [halved], "none": [vector]}
    found = tune(model, rules, {"skill": score}, grid=(0.5, 1))
    assert [(point.weighting, point.scale, point.scores["skill"]) for point in found.points] == [
        ("halved", 0, 0), ("halved", 0.5, 0), ("halved", 1, 1), ("none", 0, 0), ("none", 0.5, 1), ("none", 1, 1),
    ]  # fmt: skip
    assert (found.best.weighting, found.best.scale) == ("none", 0.5)
    turned = tune(model, dict(reversed(rules.items())), {"skill": score}, grid=(0.5, 1))
    assert (turned.best.weighting, turned.best.scale) == ("none", 0.5)


def test_where_nothing_helps_the_model_stays_as_it_is(model, vector):
    found = tune(model, {"none": [vector]}, {"skill": along(model, lambda distance: -distance)}, grid=(0.5, 1))
    assert found.best.scale == 0


def test_a_lower_perplexity_is_better_and_files_are_averaged_by_their_loss(model, vector):
    scores = {"one": along(model, lambda distance: math.exp(1 + (distance - 1) ** 2)), "two": along(model, lambda distance: math.exp(3.0))}
    found = tune(model, {"none": [vector]}, scores, metric="perplexity", grid=(0.5, 1, 2))
    assert found.best.scale == 1
    assert (found.best.score, found.best.start_score) == pytest.approx((math.exp(2), math.exp(2.5)), rel=1e-4)
    assert mean_score("perplexity", {"one": 2.0, "two": 8.0}) == pytest.approx(4)
    assert mean_score("exact_match", {"one": 0.2, "two": 0.8}) == pytest.approx(0.5)
    assert mean_score("exact_match", {}) is None


def test_forgetting_takes_the_vector_off_and_keeps_the_control(model, vector):
    start = parameters_to_vector(model.parameters()).detach().clone()
    direction = parameters_to_vector(llama(1).parameters()).detach() - start

    def taken(now):
        return -((parameters_to_vector(now.parameters()) - start) @ direction / direction.norm() ** 2).item()

    found = tune(
        model,
        {"none": [vector]},
        {"unwanted": lambda now: 1 - taken(now)},
        control={"other": lambda now: 0.8 - 0.1 * taken(now)},
        grid=(0.25, 0.5, 0.75, 1),
        control_share=0.93,
    )
    # 0.8 · 0.93 = 0.744 is kept up to 0.56.
    assert found.best._asdict() == pytest.approx(
        {"scale": 0.5, "weighting": "none", "score": 0.5, "start_score": 1, "control": 0.75, "start_control": 0.8}, abs=1e-4
    )
    strict = tune(
        model,
        {"none": [vector]},
        {"unwanted": lambda now: 1 - taken(now)},
        control={"other": lambda now: 0.8 - 0.1 * taken(now)},
        control_share=1,
    )
    assert strict.best.scale == 0


def test_forgetting_by_perplexity_wants_it_high_and_that_of_the_control_low(model, vector):
    unwanted, other = along(model, lambda distance: 2 + distance), along(model, lambda distance: 4 * (1 + distance))
    found = tune(
        model,
        {"none": [vector]},
        {"unwanted": unwanted},
        metric="perplexity",
        control={"other": other},
        grid=(0.5, 1, 2),
        control_share=0.45,
    )
    # The control may rise to 4 / 0.45 = 8.9: it stands at 8 at scale 1, and at 12 at scale 2.
    assert (found.best.scale, found.best.score, found.best.control) == pytest.approx((1, 3, 8), abs=1e-3)


def test_a_score_that_is_no_number_is_left_out_and_never_chosen(model, vector):
    score = along(model, lambda distance: math.inf if distance > 0.9 else 0.1)
    found = tune(model, {"none": [vector]}, {"skill": score, "fine": along(model, lambda distance: distance)}, grid=(0.5, 1))
    assert [set(point.scores) for point in found.points] == [{"skill", "fine"}, {"skill", "fine"}, {"fine"}]
    assert found.best.scale == 0.5


def test_the_curve_has_the_form_that_reports_read(model, vector, tmp_path):
    found = tune(model, {"none": [vector]}, {"skill": along(model, lambda distance: distance)}, grid=(0.5,))
    data = found.to_json()
    assert data["best"] == {
        "scale": 0.5, "weighting": "none", "score": data["points"][1]["scores"]["skill"], "start_score": 0.0, "control": None, "start_control": None,
    }  # fmt: skip
    assert (data["task"], data["metric"], data["kept"]) == ("merge", "exact_match", None)
    write_json(tmp_path / "tune.json", data)
    read = read_scales(tmp_path / "tune.json")
    assert read.curves == {"skill, none": {point["scale"]: point["scores"]["skill"] for point in data["points"]}}
    assert (read.metric, read.chosen) == ("exact_match", "none at scale 0.5")


def test_the_chart_has_a_line_for_each_rule_and_side(model, vector):
    score, control = along(model, lambda distance: distance), along(model, lambda distance: 1.0)
    merged = tune(model, {"none": [vector], "other": [vector]}, {"skill": score}, grid=(0.5,)).chart()
    assert [line.name for line in merged.series] == ["none", "other"]
    assert list(merged.series[0].points) == [0.0, 0.5]
    assert "exact match" in merged.y_title
    forgotten: Tuning = tune(model, {"none": [vector]}, {"skill": score}, control={"rest": control}, grid=(0.5,))
    assert [line.name for line in forgotten.chart().series] == ["none, to forget", "none, to keep"]
    assert list(forgotten.chart().series[1].points.values()) == [1.0, 1.0]
    losses = tune(model, {"none": [vector]}, {"text": along(model, lambda distance: math.exp(3.0))}, metric="perplexity", grid=(1,)).chart()
    assert list(losses.series[0].points.values()) == pytest.approx([3, 3])
    assert "loss" in losses.y_title


def test_progress_counts_every_point(model, vector):
    seen = []
    tune(
        model,
        {"none": [vector], "again": [vector]},
        {"skill": lambda _: 1.0},
        grid=(0, 1),
        progress=lambda done, count: seen.append((done, count)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("rules", "data", "more", "message"),
    [
        ({}, {"skill": 1}, {}, "at least one rule, one vector and one file"),
        ({"none": []}, {"skill": 1}, {}, "at least one rule, one vector and one file"),
        ({"none": [1]}, {}, {}, "at least one rule, one vector and one file"),
        ({"none": [1]}, {"skill": 1}, {"grid": (-0.5, math.inf, 1)}, r"others are 2: \['-0.5', 'inf'\]"),
        ({"none": [1]}, {"skill": 1}, {"control_share": 0}, r"must lie in \(0, 1\], got 0"),
    ],
)
def test_invalid_settings_are_refused(model, rules, data, more, message):
    with pytest.raises(LataError, match=message):
        tune(model, rules, data, **more)


def test_a_model_without_a_finite_score_is_refused_and_restored(model, vector):
    before = parameters_to_vector(model.parameters()).clone()
    with pytest.raises(LataError, match=r"at scale 0, has no finite exact_match on 1: \['skill'\]"):
        tune(model, {"none": [vector]}, {"skill": lambda _: math.nan})
    with pytest.raises(RuntimeError, match="no"):
        tune(model, {"none": [vector]}, {"skill": failing_later()})
    assert torch.equal(parameters_to_vector(model.parameters()), before)


def failing_later():
    answers = iter([1.0])

    def score(_):
        for answer in answers:
            return answer
        raise RuntimeError("no")

    return score


def test_a_vector_of_another_model_is_refused(model):
    other = TaskVector.between(llama(0, tied=True), llama(1, tied=True))
    with pytest.raises(LayoutMismatchError, match="must hold the same tensors"):
        tune(model, {"none": [other]}, {"skill": lambda _: 1.0})


def test_rules_share_the_tensors_of_a_vector(vector, instruction):
    found = under_rules([vector], ["none", "linear"], instruction)
    assert found["none"][0].tensors is found["linear"][0].tensors
    assert found["none"][0].manifest.coefficients is None
    assert found["linear"][0].manifest.coefficients == linear_drop_by_rank(align(vector, instruction))


def test_a_vector_that_started_from_base_is_counted_from_instruct(model, instruction):
    complex_vector = TaskVector.between(llama(2), llama(1), start_kind="base")
    found = under_rules([complex_vector], ["none", "linear"], instruction)
    task = TaskVector.between(model, llama(1))
    assert {vector[0].start for vector in found.values()} == {"instruct"}
    for name in task:
        assert torch.allclose(found["linear"][0][name], task[name], atol=1e-6)
    assert found["linear"][0].manifest.coefficients == pytest.approx(linear_drop_by_rank(align(task, instruction)))
    Term(found["linear"][0])


def test_stored_alignments_are_used_without_an_instruction_vector(vector, instruction):
    alignment = align(vector, instruction)
    stored = vector.weighted(alignment, "log")
    found = under_rules([stored], ["threshold", "none"], threshold=-1.0)
    assert set(found["threshold"][0].manifest.coefficients.values()) == {0.0}
    assert found["none"][0].manifest.coefficients is None
    with pytest.raises(LataError, match=r"stores no alignment by tensor, so the rule 'linear' needs an instruction vector"):
        under_rules([stored], ["linear"], level="tensor")


def test_an_unknown_rule_is_refused(vector):
    with pytest.raises(WeightingError, match="unknown weighting 'best'"):
        under_rules([vector], ["best"])


def test_the_search_of_a_method_that_makes_one_vector_begins_at_scale_one(model, vector):
    tried = []
    score = along(model, lambda distance: tried.append(round(distance, 3)) or -abs(distance - 1))
    tune(model, {"none": [vector], "regression": [vector]}, {"skill": score}, metric="accuracy", made_into_one=["regression"])
    # The model itself, the rule from the smallest scale on, then the method.
    assert tried[:3] == [0.0, 0.1, 0.3]
    assert tried.index(1.4) > tried.index(1.0)
    assert [scale for scale in tried if scale == 1.0] == [1.0, 1.0]
    assert tried[tried.index(1.0, tried.index(1.0) + 1) + 1] == 1.4
