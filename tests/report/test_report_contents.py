import json
import math
import shutil

import pytest
import torch
from report_inputs import charts, row, write_model, write_run

from lata_lightning import regress
from lata_lightning.display.charts import HeatMap
from lata_lightning.errors import LataError
from lata_lightning.layers import layer_map
from lata_lightning.moments import Moments
from lata_lightning.report import figures
from lata_lightning.report.contents import build
from lata_lightning.store.run_directory import VECTOR_NAME
from lata_lightning.vectors.task_vector import TaskVector

BLOCKS = ("model.layers.0", "model.layers.1")


def flat(difference, inside=""):
    return torch.cat([tensor.double().reshape(-1) for name, tensor in difference.items() if inside in name])


def cosine(one, other):
    return (torch.dot(one, other) / one.norm() / other.norm()).item()


def section(report, key):
    return next(section for section in report.sections if section.key == key)


def facts(report, label):
    return dict(next(table.rows for table in section(report, "provenance").tables if table.title == label))


def test_the_heat_map_of_a_run_holds_the_alignments_of_its_history_step_by_layer(tmp_path):
    run = write_run(tmp_path / "run", [row(10, {"h.0": 0.9, "h.1": 0.8}), row(20, {"h.0": 0.7, "h.1": None}, epoch=1)])
    found = charts(build([run]))["alignment-1"]
    assert found.values == ((0.9, 0.8), (0.7, None))
    assert (found.rows, found.columns) == (("step 10, epoch 0", "step 20, epoch 1"), ("h.0", "h.1"))
    assert (found.row_ticks, found.column_ticks) == (("10", "20"), ("0", "1"))
    assert found.limits == (0.7, 0.9)
    assert "2 measurements from step 10 to step 20. At the last one: 0.7000 (h.0)." in found.summary
    assert "Undefined in 1 of them" in found.summary


def test_runs_share_one_colour_scale(tmp_path):
    one = write_run(tmp_path / "one", [row(10, {"h.0": 0.9, "h.1": 0.8})])
    other = write_run(tmp_path / "other", [row(10, {"h.0": 0.2, "h.1": 0.3})])
    found = charts(build([one, other]))
    assert found["alignment-1"].limits == found["alignment-2"].limits == (0.2, 0.9)


def test_growth_follows_the_whole_model_and_leaves_out_what_was_not_measured(tmp_path):
    one = write_run(tmp_path / "one", [row(10, {"h.0": 0.9}, relative_norm=0.1), row(20, {"h.0": 0.8}, relative_norm=0.2)])
    other = write_run(tmp_path / "other", [row(5, {"h.0": None})])
    found = charts(build([one, other]))
    assert [(line.name, dict(line.points)) for line in found["growth-norm"].series] == [("one", {10: 1.0, 20: 2.0}), ("other", {5: 0.5})]
    assert [(line.name, dict(line.points)) for line in found["growth-relative"].series] == [("one", {10: 0.1, 20: 0.2})]
    assert "growth-alignment" not in found
    assert found["growth-norm"].summary == "one: 1 at step 10, 2 at step 20; other: 0.5 at step 5."
    assert found["growth-norm"].table() == (["optimizer steps", "one", "other"], [["5", "–", "0.5"], ["10", "1", "–"], ["20", "2", "–"]])


def test_stored_coefficients_and_alignments_are_shown_by_layer(vectors):
    directory, differences = vectors
    found = charts(build([directory / "math"]))
    expected = {
        block: cosine(flat(differences["math"], block) + flat(differences["instruction"], block), flat(differences["instruction"], block))
        for block in BLOCKS
    }
    (line,) = found["alignments"].series
    assert dict(line.points) == pytest.approx(expected, abs=1e-6)
    ranked = sorted(expected, key=lambda block: -expected[block])
    assert dict(found["coefficients"].series[0].points) == {ranked[0]: 0.5, ranked[1]: 1.0}
    assert list(found["coefficients"].ticks.values()) == ["0", "1"]


def test_parts_have_the_norms_of_their_tensors_and_with_an_instruction_vector_their_alignment(vectors):
    directory, differences = vectors
    found = charts(build([directory / "string"], directory / "instruction"))
    parts = {"attention": "self_attn", "mlp": "mlp", "norm": "input_layernorm"}
    assert found["part-norms-1"].rows == tuple(parts)
    for place, part in enumerate(parts):
        for number, block in enumerate(BLOCKS):
            task, direction = (flat(differences[name], f"{block}.{parts[part]}") for name in ("string", "instruction"))
            assert found["part-norms-1"].values[place][number] == pytest.approx(task.norm().item(), rel=1e-6)
            assert found["part-relative-norms-1"].values[place][number] == pytest.approx((task.norm() / direction.norm()).item(), rel=1e-6)
            assert found["part-alignments-1"].values[place][number] == pytest.approx(cosine(task + direction, direction), abs=1e-6)


def test_without_an_instruction_vector_parts_have_norms_alone(vectors):
    report = build([vectors[0] / "string"])
    assert [chart.key for chart in section(report, "parts").charts] == ["part-norms-1"]
    assert "--instruction" in section(report, "parts").lead


def test_a_vector_without_stored_alignment_is_measured_along_the_given_one(vectors):
    directory, differences = vectors
    report = build([directory / "string"], directory / "instruction")
    task, direction = flat(differences["string"]), flat(differences["instruction"])
    of_blocks = [(flat(differences["string"], block), flat(differences["instruction"], block)) for block in BLOCKS]
    alignments = [cosine(one + other, other) for one, other in of_blocks]
    assert dict(report.cards[0].figures) == {
        "alignment": f"{cosine(task + direction, direction):.4f}",
        "relative norm": f"{(task.norm() / direction.norm()).item():.4f}",
        "norm": f"{task.norm().item():.4g}",
        "spread of the layers": f"{max(alignments) - min(alignments):.4f}",
    }
    assert set(charts(report)) >= {"alignments", "relative-norms", "norms"}
    assert "coefficients" not in charts(report)


def test_pairs_have_the_cosine_over_all_tensors_and_by_block(vectors):
    directory, differences = vectors
    found = charts(build([directory / "math", directory / "string", directory / "instruction"]))
    names = ("math", "string", "instruction")
    whole = [[cosine(flat(differences[one]), flat(differences[other])) for other in names] for one in names]
    for values, expected in zip(found["pairs-whole"].values, whole, strict=True):
        assert values == pytest.approx(expected, abs=1e-6)
    assert found["pairs-by-block"].rows == ("math · string", "math · instruction", "string · instruction")
    assert found["pairs-by-block"].values[0] == pytest.approx(
        [cosine(flat(differences["math"], block), flat(differences["string"], block)) for block in BLOCKS], abs=1e-6
    )


def test_a_vector_that_started_from_base_is_shown_without_the_instruction_vector(vectors, tmp_path):
    directory, differences = vectors
    start, tuned = ({name: torch.zeros_like(tensor) for name, tensor in differences["math"].items()} for _ in range(2))
    tuned = {name: differences["math"][name] + differences["instruction"][name] for name in tuned}
    TaskVector.between(start, tuned, start_kind="base").save(tmp_path / "whole")
    found = charts(build([tmp_path / "whole", directory / "math"], directory / "instruction", check_base=False))
    assert found["pairs-whole"].values[0][1] == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(LataError, match="started from base, so it contains the instruction vector"):
        build([tmp_path / "whole"])


def test_interference_is_a_heat_map_for_each_vector_that_was_made_of_several(vectors, tmp_path):
    directory, _ = vectors
    one = regress([TaskVector.open(directory / name) for name in ("math", "string")]).save(tmp_path / "one")
    found = section(build([directory / "math", tmp_path / "one"]), "interference")
    (chart,) = found.charts
    interference = [entry for entry in one.manifest.derivation.measured if entry.name == "interference"]
    assert chart.rows == tuple(entry.vector for entry in interference) == (str(directory / "math"), str(directory / "string"))
    assert chart.columns == (*BLOCKS, "outside the layers")
    assert chart.column_ticks == ("0", "1", "outside")
    assert chart.values == tuple(tuple(entry.layers.values()) for entry in interference)
    with pytest.raises(StopIteration):
        section(build([directory / "math", directory / "string"]), "interference")


def test_scale_curves_show_every_score_in_rising_order(tmp_path):
    run = write_run(tmp_path / "run", [row(10, {"h.0": 0.9})])
    points = [{"scale": 1, "scores": {"math": 0.4, "string": 0.2}}, {"scale": 0.5, "scores": {"math": 0.6}}]
    (run / "tune.json").write_text(json.dumps({"points": points}))
    found = charts(build([run]))["scales-1"]
    assert [(line.name, list(line.points.items())) for line in found.series] == [
        ("math", [(0.5, 0.6), (1.0, 0.4)]),
        ("string", [(1.0, 0.2)]),
    ]
    assert found.summary == "2 scales from 0.5 to 1. math: 0.4 (at 1) to 0.6 (at 0.5). string: 0.2 (at 1)."
    alone = build([run / "tune.json"])
    assert charts(alone)["scales-1"].series == found.series
    assert (alone.cards[0].kind, alone.cards[0].figures) == ("scales tried", [])


def test_scale_curves_of_several_rules_and_of_controls_are_lines_of_their_own(tmp_path):
    points = [
        {"scale": scale, "weighting": rule, "scores": {"math": scale * size}, "control": {"facts": 0.5}}
        for rule, size in (("none", 0.1), ("linear", 0.2))
        for scale in (0.5, 1.0)
    ]
    best = {"scale": 1.0, "weighting": "linear", "score": 0.2}
    (tmp_path / "tune.json").write_text(json.dumps({"metric": "exact_match", "points": points, "best": best}))
    report = build([tmp_path])
    found = charts(report)["scales-1"]
    assert {line.name: dict(line.points) for line in found.series} == {
        "math, none": {0.5: 0.05, 1.0: 0.1},
        "facts (control), none": {0.5: 0.5, 1.0: 0.5},
        "math, linear": {0.5: 0.1, 1.0: 0.2},
        "facts (control), linear": {0.5: 0.5, 1.0: 0.5},
    }
    assert found.y_title == "exact_match"
    assert "Chosen: linear at scale 1." in found.summary
    assert report.cards[0].kind == "chosen: linear at scale 1"


def test_vectors_with_other_layers_get_charts_of_their_own(tmp_path):
    one = write_run(tmp_path / "one", [row(10, {"h.0": 0.9, "h.1": 0.8})])
    other = write_run(tmp_path / "other", [row(10, {"h.0.mlp": 0.9, "h.1.mlp": 0.8}, level="submodule")])
    found = charts(build([one, other]))
    assert (found["alignments-1"].title, found["alignments-2"].title) == ("Alignment by layer: one", "Alignment by layer: other")


def test_measurements_by_other_layers_are_left_out_and_counted(tmp_path):
    rows = [row(10, {"h.0.mlp": 0.9, "h.1.mlp": 0.8}, level="submodule"), row(20, {"h.0": 0.7, "h.1": 0.6})]
    found = charts(build([write_run(tmp_path / "run", rows)]))["alignment-1"]
    assert found.values == ((0.7, 0.6),)
    assert "Earlier measurements by other layers, not shown: 1." in found.summary


def test_tensors_of_no_block_are_listed_and_need_no_chart(tmp_path):
    report = build([write_run(tmp_path / "run", [row(10, {})])])
    assert section(report, "layers").empty == "No tensor belongs to a block, so there is no layer to show."
    assert section(report, "layers").tables[0].rows == [["run", "lm_head.weight", "0.5000", "0.5000", "1", "–"]]
    weight = {"net.weight": torch.ones(2, 2)}
    for name, factor in (("one", 2.0), ("two", 3.0)):
        TaskVector.between(weight, {"net.weight": factor * weight["net.weight"]}).save(tmp_path / name)
    report = build([tmp_path / "one", tmp_path / "two"])
    assert section(report, "parts").empty == "No tensor belongs to a block."
    assert [chart.key for chart in section(report, "pairs").charts] == ["pairs-whole"]


@pytest.mark.parametrize(("last", "warned"), [(0.84, True), (0.7, False)])
def test_the_card_warns_where_alignments_are_too_flat_to_rank(tmp_path, last, warned):
    card = build([write_run(tmp_path / "run", [row(10, {"h.0": 0.8, "h.1": last})])]).cards[0]
    assert (card.warning is not None) == warned
    assert card.kind == "run, 1 measurement · step 10 · no vector yet"
    if warned:
        assert card.warning.startswith("The alignments spread by 0.0400, less than 0.05: too little to rank the layers by.")
        assert "Merge with --weighting none, or let lata tune compare the rules" in card.warning


def test_the_card_says_when_the_ranking_is_one_by_relative_norm(tmp_path):
    # Relative norms 0.1, 0.2, 0.3 and 0.4; the smaller one is, the better the layer is aligned.
    def measured(values):
        entry = row(10, dict(zip(("h.0", "h.1", "h.2", "h.3"), values, strict=True)))
        for number, stats in enumerate(entry["layers"].values(), start=1):
            stats |= {"task_norm": number / 10, "relative_norm": number / 10, "instruction_norm": 1.0}
        return build([write_run(tmp_path / f"run-{values[0]}", [entry])]).cards[0].warning

    assert measured([0.9, 0.8, 0.7, 0.6]) == (
        "The ranking is one by relative norm: the rank correlation of alignment with −relative norm is 1.00."
    )
    assert measured([0.8, 0.6, 0.9, 0.7]) is None


def test_provenance_repeats_the_manifest(vectors):
    directory, _ = vectors
    stored = json.loads((directory / "math" / "task_vector.json").read_text())
    shown = facts(build([directory / "math"]), "math")
    assert stored["start"]["content_hash"] in shown["start"]
    assert stored["tuned"]["content_hash"] in shown["tuned"]
    assert stored["instruction_vector"]["base"]["content_hash"] in shown["instruction vector"]
    assert shown["versions"].startswith(f"lata_lightning {stored['versions']['lata_lightning']}")
    assert (shown["weighting"], shown["level"], shown["coefficient outside"]) == ("linear", "block", "0.0")
    assert shown["parameters"] == f"{sum(math.prod(entry['shape']) for entry in stored['tensors'].values())}"


def test_provenance_shows_the_versions_that_were_written_not_those_of_today(vectors, tmp_path):
    shutil.copytree(vectors[0] / "math", tmp_path / "old")
    manifest = tmp_path / "old" / "task_vector.json"
    stored = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**stored, "versions": {"torch": "0.0.old"}}))
    assert facts(build([tmp_path / "old"]), "old")["versions"] == "torch 0.0.old"


def test_provenance_tells_threshold_and_precision_loss(vectors, tmp_path):
    directory, _ = vectors
    vector = TaskVector.open(directory / "math")
    vector.weighted(vector.manifest.alignment, "threshold", threshold=0.9).save(tmp_path / "low", dtype="bfloat16")
    shown = facts(build([tmp_path / "low"]), "low")
    assert shown["threshold"] == "0.9"
    assert shown["precision loss"].startswith("0.00% became zero, cosine 0.99999")


def test_a_run_with_its_vector_is_shown_as_both(vectors, tmp_path):
    directory, _ = vectors
    run = write_run(tmp_path / "run", [row(10, {"h.0": 0.9, "h.1": 0.2})])
    shutil.copytree(directory / "math", run / VECTOR_NAME)
    report = build([run])
    assert set(charts(report)) >= {"alignment-1", "growth-norm", "coefficients", "part-norms-1"}
    assert report.cards[0].kind == "run, 1 measurement · step 10 · started from instruct"
    # What the vector stores goes before the history.
    assert set(charts(report)["coefficients"].ticks) == set(BLOCKS)


def test_a_long_title_is_cut(tmp_path):
    paths = [write_run(tmp_path / str(number), [row(1, {"h.0": 0.5})]) for number in range(6)]
    assert build(paths).title == "0, 1, 2, 3 and 2 more"


def test_vectors_of_other_starts_are_shown_with_a_notice(vectors, tmp_path):
    directory, differences = vectors
    TaskVector.between(differences["math"], differences["string"]).save(tmp_path / "stranger")
    assert build([directory / "math", directory / "string"]).notices == []
    (notice,) = build([directory / "math", tmp_path / "stranger"]).notices
    assert "started from different weights" in notice


@pytest.mark.parametrize(
    ("key", "words"),
    [("training", "no history"), ("growth", "no history"), ("pairs", "Name a second run or vector")],
)
def test_a_section_without_data_says_how_to_get_it(vectors, key, words):
    found = section(build([vectors[0] / "math"]), key)
    assert (len(found.charts), words in found.empty) == (0, True)


def test_a_run_without_instruction_vector_says_what_to_pass(tmp_path):
    found = build([write_run(tmp_path / "run", [row(10, {"h.0": None})])])
    assert "LATACallback(instruction_vector=…)" in section(found, "training").empty
    assert "a run writes it when training ends" in section(found, "parts").empty


def test_cosines_with_other_vectors_are_drawn_over_the_steps_of_runs_that_know_them(tmp_path):
    watched = [
        {**row(step, {"h.0": 0.9}, epoch=None), "cosine/math": value, "cosines": {"math": {"h.0": value}}}
        for step, value in ((10, 0.3), (20, -0.1))
    ]
    report = build([write_run(tmp_path / "watched", watched), write_run(tmp_path / "plain", [row(10, {"h.0": 0.8})])])
    (series,) = charts(report)["cosine-math"].series
    assert series.points == {10: 0.3, 20: -0.1}
    assert charts(report)["alignment-1"].rows == ("step 10", "step 20")


def test_a_part_that_a_block_lacks_has_no_value():
    names = ["h.0.attn.weight", "h.0.mlp.weight", "h.1.attn.weight"]
    (found,) = figures.by_part([(0, "run", {name: Moments(task=4.0) for name in names})], layer_map(names))
    assert isinstance(found, HeatMap)
    assert (found.rows, found.values) == (("attention", "mlp"), ((2.0, 2.0), (2.0, None)))


def test_merged_models_are_compared_by_what_they_are_made_of_and_by_their_scores(tmp_path):
    one = write_model(tmp_path / "one", {"math": 0.8, "string": 0.5}, {"math": {"exact_match": 0.61, "perplexity": 4.25}})
    other = write_model(tmp_path / "other", {"math": 1.0}, {"math": {"exact_match": 0.7}, "string": {"exact_match": None}})
    section = next(section for section in build([one, other]).sections if section.key == "models")
    scores, terms = section.tables
    assert [(chart.value_title, chart.rows, chart.columns) for chart in section.charts] == [
        ("exact match", ("one", "other"), ("math", "string")), ("perplexity", ("one", "other"), ("math",)),
    ]  # fmt: skip
    assert section.charts[0].values == ((0.61, None), (0.7, None))
    assert scores.heads == ["model", "math, exact match", "math, perplexity", "string, exact match"]
    assert scores.rows == [["one", "0.61", "4.25", "–"], ["other", "0.7", "–", "–"]]
    assert terms.rows == [
        ["one", "models/instruct", "math", "0.8", "none"],
        ["", "", "string", "0.5", "none"],
        ["other", "models/instruct", "math", "1", "none"],
    ]


def test_scores_have_their_intervals_and_a_single_model_needs_no_chart(tmp_path):
    model = write_model(tmp_path / "one", {"math": 1.0}, {"math": {"exact_match": 0.5}})
    sample = {"math": {"n": 10, "intervals": {"exact_match": [0.25, 0.75]}}}
    (model / "scores.json").write_text(json.dumps({"scores": {"math": {"exact_match": 0.5}}, "sample": sample}))
    section = next(section for section in build([model]).sections if section.key == "models")
    assert section.tables[0].rows == [["one", "0.5 (0.25 – 0.75)"]]
    assert section.charts == []


def test_merged_models_without_scores_say_how_to_get_them(tmp_path):
    section = next(section for section in build([write_model(tmp_path / "one", {"math": 1.0})]).sections if section.key == "models")
    assert "lata evaluate MODEL --data FILE --output MODEL" in section.empty


def test_flat_alignments_are_drawn_in_grey_and_others_are_not(tmp_path):
    flat = write_run(tmp_path / "flat", [row(1, {"h.0": 0.90, "h.1": 0.91})])
    steep = write_run(tmp_path / "steep", [row(1, {"h.0": 0.9, "h.1": 0.5})])
    charts = {chart.key: chart for chart in build([flat, steep]).charts}
    assert (charts["alignment-1"].muted, charts["alignment-2"].muted) == (True, False)
    assert "drawn in grey" in charts["alignment-1"].summary
    assert {line.name: line.muted for line in charts["alignments"].series} == {"flat": True, "steep": False}
    assert not any(line.muted for line in charts["norms"].series)


def test_a_tensor_that_did_not_move_has_no_figures(tmp_path):
    entry = row(1, {"h.0": 0.9, "h.1": 0.5})
    entry["outside"] = {
        "frozen.weight": {"alignment": 1.0, "relative_norm": 0.0, "task_norm": 0.0, "instruction_norm": 2.0, "coefficient": None}
    }
    section = next(section for section in build([write_run(tmp_path / "run", [entry])]).sections if section.key == "layers")
    assert section.tables[0].rows == [["run", "frozen.weight", "–", "–", "–", "–"]]


def test_a_layer_that_did_not_move_has_no_figures(tmp_path):
    entry = row(1, {"h.0": 0.9, "h.1": 0.5, "h.2": 1.0})
    entry["layers"]["h.2"] |= {"task_norm": 0.0, "relative_norm": 0.0}
    found = charts(build([write_run(tmp_path / "run", [entry])]))
    assert found["alignment-1"].values == ((0.9, 0.5, None),)
    assert found["alignment-1"].limits == (0.5, 0.9)
    for key in ("alignments", "norms", "relative-norms"):
        assert found[key].series[0].points["h.2"] is None


def test_layers_are_on_the_horizontal_axis_of_every_chart(vectors, tmp_path):
    run = write_run(tmp_path / "run", [row(1, {"h.0": 0.9, "h.1": 0.5})])
    directory, _ = vectors
    found = [*build([directory / "math", directory / "string"], directory / "instruction").charts, *build([run]).charts]
    layered = [chart for chart in found if "block" in (chart.column_title if isinstance(chart, HeatMap) else chart.x_title)]
    assert len(layered) > 6
    assert not any(isinstance(chart, HeatMap) and "block" in chart.row_title for chart in found)
