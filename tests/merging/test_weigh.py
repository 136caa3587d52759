import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import BLOCKS, weights, write_model

from lata_lightning.alignment import Alignment, LayerStats
from lata_lightning.errors import LataError, WeightingError
from lata_lightning.merging.merge import Term, forget, merge
from lata_lightning.merging.weigh import applied, check_asked_for, from_instruct, weigh
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.task_vector import TaskVector

FLAT, STEEP = (0.90, 0.93), (0.30, 0.90)


def measured(values, level="block", layers=BLOCKS, norms=None):
    norms = norms or [1.0] * len(values)
    stats = {layer: LayerStats(value, norm, norm, 1.0) for layer, value, norm in zip(layers, values, norms, strict=True)}
    return Alignment(level, "instruct", stats, {})


def task(**options):
    return TaskVector.between(weights(0), weights(1), **options)


def saved(path, values, rule="linear", **options):
    task().weighted(measured(values), rule, **options).save(path)
    return TaskVector.open(path)


def by_norm(alignment):
    return {layer: stats.relative_norm for layer, stats in alignment.layers.items()}


# --- what a file says, and nobody asks for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "ways"),
    [
        ("linear", "--weighting linear, --weighting stored"),
        ("threshold", "--weighting threshold, --weighting stored"),
        (by_norm, "(--weighting stored"),
    ],
)
def test_stored_coefficients_of_flat_alignments_are_refused_and_both_ways_on_are_named(tmp_path, rule, ways):
    flat = saved(tmp_path / "flat", FLAT, rule)
    with pytest.raises(WeightingError, match=r"spread by 0.0300, less than 0.05") as refusal:
        Term(flat)
    assert str(tmp_path / "flat") in str(refusal.value)
    assert "--weighting none, .unweighted()" in str(refusal.value)
    assert ways in str(refusal.value)
    with pytest.raises(WeightingError, match="not applied unless you ask for it"):
        weigh(flat)


@pytest.mark.parametrize("changes", [{"epoch": 3}, {"start": "instruct"}, {"outside": 0.5}])
def test_a_file_asks_for_nothing_whatever_else_is_changed_in_its_manifest(tmp_path, changes):
    flat = saved(tmp_path / "flat", FLAT)
    with pytest.raises(WeightingError, match="too little to rank the layers by"):
        Term(TaskVector(flat.tensors, replace(flat.manifest, **changes)))


def test_nothing_is_written_where_flat_coefficients_are_refused(tmp_path):
    start = write_model(tmp_path / "start", weights(0))
    flat = saved(tmp_path / "flat", FLAT)
    for write in (lambda: merge(start, [Term(flat)], tmp_path / "out"), lambda: forget(start, Term(flat), tmp_path / "out")):
        with pytest.raises(WeightingError):
            write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flat", "start"]


def test_stored_coefficients_of_alignments_that_differ_are_applied(tmp_path):
    steep = saved(tmp_path / "steep", STEEP)
    assert weigh(steep).manifest.coefficients == {BLOCKS[0]: 1.0, BLOCKS[1]: 0.5}
    assert Term(steep).factor(f"{BLOCKS[1]}.mlp.up_proj.weight") == 0.5
    assert Term(steep).factor("lm_head.weight") == 0.0


@pytest.mark.parametrize("rule", ["none", "closed-form"])
def test_coefficients_that_no_alignment_made_are_applied_however_flat_it_is(tmp_path, rule):
    vector = task().weighted(measured(FLAT), "linear").with_coefficients(dict.fromkeys(BLOCKS, 0.5), outside=0.25, weighting=rule)
    vector.save(tmp_path / "vector")
    opened = TaskVector.open(tmp_path / "vector")
    assert Term(opened).factor("lm_head.weight") == 0.25
    assert len(applied(opened)) == 1


def test_coefficients_that_were_set_in_this_process_are_asked_for(tmp_path):
    flat = saved(tmp_path / "flat", FLAT)
    alignment = flat.manifest.alignment
    for vector in (
        flat.weighted(alignment, "log"),
        flat.with_coefficients(by_norm),
        flat.with_coefficients(dict.fromkeys(BLOCKS, 0.5), weighting="mine"),
        flat.unweighted(),
        weigh(flat, "stored"),
        weigh(flat, "linear"),
        weigh(flat, "none"),
        flat.weighted(alignment, "linear").save(tmp_path / "again"),
    ):
        Term(vector)
    with pytest.raises(WeightingError):
        check_asked_for(TaskVector.open(tmp_path / "again"))


# --- rules ---------------------------------------------------------------------------------------------------------------------------------


def test_no_rule_means_the_default_where_an_alignment_is_measured():
    instruction = TaskVector.between(weights(5), weights(6), kind="instruction")
    vector = task()
    found = weigh(vector, None, instruction, check_base=False, default="threshold", threshold=-1.0)
    assert found.manifest.weighting == "threshold"
    assert set(found.manifest.coefficients.values()) == {0.0}
    ranked = weigh(vector, None, instruction, check_base=False)
    expected = vector.weighted(align(vector, instruction, check_base=False), "linear", instruction_vector=instruction)
    assert ranked.manifest == expected.manifest


def test_a_rule_takes_the_stored_alignment_at_its_own_level(tmp_path):
    parts = list(task().layers.layers("submodule"))
    values = [0.1 * number for number in range(len(parts))]
    task().weighted(measured(values, "submodule", parts), "linear", outside=0.5).save(tmp_path / "vector")
    vector = TaskVector.open(tmp_path / "vector")
    found = weigh(vector, "log")
    assert (found.manifest.level, found.manifest.weighting, found.manifest.outside) == ("submodule", "log", 0.0)
    assert found.manifest.coefficients[parts[-1]] == 0.0
    with pytest.raises(WeightingError, match=r"stores no alignment by block, so the rule 'linear' needs an instruction vector"):
        weigh(vector, "linear", level="block")


def test_the_instruction_vector_that_was_measured_with_stays_on_record():
    instruction = TaskVector.between(weights(5), weights(6), kind="instruction")
    vector = weigh(task(), "linear", instruction, check_base=False)
    known = vector.manifest.instruction_identity
    assert known is not None
    assert weigh(vector, "log").manifest.instruction_identity == known


def test_a_custom_rule_is_recorded_by_its_name_and_merged(tmp_path):
    alignment = measured(STEEP, norms=(0.25, 2.0))
    start = write_model(tmp_path / "start", weights(0))
    merge(start, [Term(weigh(task(), by_norm, alignment=alignment), 0.5)], tmp_path / "out")
    (term,) = json.loads((tmp_path / "out/merge.json").read_text())["terms"]
    assert (term["weighting"], term["coefficients"]) == ("by_norm", {BLOCKS[0]: 0.25, BLOCKS[1]: 2.0})
    name = f"{BLOCKS[1]}.mlp.up_proj.weight"
    merged, (one, other) = load_file(tmp_path / "out/model.safetensors"), (weights(seed)[name].double() for seed in (0, 1))
    torch.testing.assert_close(merged[name].double(), one + 0.5 * 2.0 * (other - one), rtol=1e-6, atol=1e-6)


def test_a_custom_rule_survives_saving(tmp_path):
    for name, vector in {
        "rule": task().weighted(measured(STEEP), by_norm),
        "numbers": task().with_coefficients(dict.fromkeys(BLOCKS, 0.125), weighting="by-hand.2"),
    }.items():
        vector.save(tmp_path / name)
        opened = TaskVector.open(tmp_path / name)
        assert opened.manifest.weighting == vector.manifest.weighting
        assert opened.manifest.coefficients == vector.manifest.coefficients
        assert Term(opened).factor("lm_head.weight") == 0.0
        assert f"by the rule `{vector.manifest.weighting}`" in (tmp_path / name / "README.md").read_text()


def test_stored_coefficients_that_are_not_there_cannot_be_asked_for():
    with pytest.raises(WeightingError, match="stores no coefficients to apply: ask for a rule, or for 'none'"):
        weigh(task(), "stored")
    with pytest.raises(WeightingError, match="unknown weighting 'square'"):
        weigh(task(), "square", alignment=measured(STEEP))


def test_a_function_needs_the_alignment_that_a_vector_stores():
    with pytest.raises(LataError, match="stores no alignment by block for the rule 'by_norm': measure one with align"):
        task().with_coefficients(by_norm)
    with pytest.raises(LataError, match="stores no alignment by tensor"):
        task().weighted(measured(STEEP), "linear").with_coefficients(by_norm, level="tensor")


def test_a_vector_from_base_counts_from_instruct_once_the_instruction_vector_is_given():
    instruction = TaskVector.between(weights(0), weights(2), kind="instruction")
    complex_vector = task(start_kind="base")
    weighted = weigh(complex_vector, "linear", instruction)
    assert weighted.start == "base"
    counted = from_instruct(weighted, instruction)
    assert (counted.start, counted.manifest.coefficients) == ("instruct", weighted.manifest.coefficients)
    assert from_instruct(complex_vector, None) is complex_vector
    assert from_instruct(counted, instruction) is counted


# --- what is said and recorded -------------------------------------------------------------------------------------------------------------


def test_one_sentence_says_what_is_applied():
    assert applied(task().unweighted()) == [f"{task().label}: coefficient 1 for every tensor"]
    (said,) = applied(task().weighted(measured(STEEP), "linear", outside=0.25))
    assert "coefficients by the rule 'linear': 0.5 to 1 for 2 layers (by block)" in said
    assert "0.25 for the tensors outside of them, 3: ['lm_head.weight', 'model.embed_tokens.weight', 'model.norm.weight']" in said


@pytest.mark.parametrize("rule", ["linear", "log", "threshold", by_norm])
def test_rules_by_alignment_are_followed_by_the_spread_where_it_is_small(rule):
    _, caution = applied(task().weighted(measured(FLAT), rule))
    assert caution.endswith("The alignments spread by 0.0300, less than 0.05: too little to rank the layers by.")
    assert len(applied(task().weighted(measured(STEEP), rule))) == 1


def test_a_merge_records_what_its_ranking_is_worth(tmp_path):
    start = write_model(tmp_path / "start", weights(0))
    flat = saved(tmp_path / "flat", FLAT)
    merge(start, [Term(weigh(flat, "stored")), Term(saved(tmp_path / "steep", STEEP)), Term(task())], tmp_path / "out")
    terms = json.loads((tmp_path / "out/merge.json").read_text())["terms"]
    keys = ("weighting", "weighting_asked_for", "alignment_spread", "alignment_too_flat_to_rank")
    found = [tuple(term[key] for key in keys) for term in terms]
    assert found == [("linear", True, pytest.approx(0.03), True), ("linear", False, pytest.approx(0.6), False), ("none", True, None, None)]
