"""Heterogeneity: rank correlation by hand, longer fine-tunes beside the usual ones, and a whole run on toy models."""

import json
from statistics import fmean

import pytest
from toy_chains import TOY, little, little_texts

from lata_lightning.errors import LataError
from study import chain as chains
from study import heterogeneity, merging
from study.heterogeneity import LongerChain, Variant, rank_correlation


@pytest.fixture(autouse=True)
def _small(tmp_path, monkeypatch):
    little(monkeypatch)
    monkeypatch.setenv("LATA_DATA", str(little_texts(tmp_path / "data")))
    monkeypatch.setattr(merging.tasks, "base_perplexity", lambda model, split, data: 2.0)
    monkeypatch.setattr(heterogeneity, "SCALES", (0.0, 1.0))


def test_rank_correlation_is_one_where_a_larger_norm_means_a_smaller_alignment():
    alignment = {"first": [0.9, 0.9], "second": [0.8, 0.8], "third": [0.7, 0.7]}
    norms = {"first": [0.1, 0.3], "second": [0.2, 0.2], "third": [0.3, 0.1]}
    # +1 for the first expert, −1 for the second.
    assert rank_correlation(alignment, norms) == pytest.approx(0.0)
    assert rank_correlation(
        {layer: values[:1] for layer, values in alignment.items()}, {layer: values[:1] for layer, values in norms.items()}
    ) == (pytest.approx(1.0))


def test_a_longer_chain_tunes_experts_longer_and_shares_everything_else(tmp_path):
    usual, longer = LongerChain(1.0, tmp_path, 0, TOY), LongerChain(3.0, tmp_path, 0, TOY)
    steps = []
    for chain in (usual, longer):
        tuned = chain.tuned
        chain.tuned = lambda key, start, recipe, tuned=tuned: steps.append((key, recipe.steps)) or tuned(key, start, recipe)
        chain.expert("compute", "instruct")
    assert [key for key, _ in steps] == ["compute-from-instruct", "compute-from-instruct-x3"]
    usual_steps = TOY.tuning * chains.expert_recipe("compute", "instruct", 0, None).steps
    assert [found for _, found in steps] == [round(usual_steps), round(3 * usual_steps)]
    assert usual.folder == longer.folder
    assert len(list(usual.folder.glob("base*.safetensors"))) == 1


def test_names_tell_variants_apart():
    assert Variant(TOY).name == "2 blocks of width 16"
    assert Variant(TOY, 3.0).name == "2 blocks of width 16, tuned 3 times as long"
    assert len({variant.name for variant in heterogeneity.VARIANTS}) == len(heterogeneity.VARIANTS)


def test_shapes_that_share_a_folder_are_trained_alike():
    shapes = {str(variant.shape): variant.shape for variant in heterogeneity.VARIANTS}
    assert all(variant.shape == shapes[str(variant.shape)] for variant in heterogeneity.VARIANTS)


def test_a_run_holds_every_variant_and_protocol_and_says_the_same_again(tmp_path, monkeypatch):
    # Toy experts learn nothing, which merging refuses; the scores are made up.
    calls = []

    def reference(chain, setting, models):
        calls.append(setting.protocol)
        names = (*setting.experts, "instruct")
        own = dict.fromkeys(names, 0.9)
        return {
            **{of: {"validation": dict.fromkeys(names, 0.1), "test": dict.fromkeys(names, 0.1)} for of in ("start", "instruct")},
            **{task: {"validation": own, "test": own} for task in setting.experts},
            "own": {"validation": own, "test": own},
        }

    monkeypatch.setattr(merging, "_reference", reference)
    variants = (Variant(TOY), Variant(TOY, 3.0, ("instruct",)))
    first, second = (heterogeneity.run(tmp_path, 0, variants, data=tmp_path) for _ in range(2))
    # Of the second run nothing is trained or evaluated anew, and its time is said all the same.
    assert second["cpu_minutes"]["training"] == pytest.approx(first["cpu_minutes"]["training"], rel=1e-6)
    assert first["cpu_minutes"]["training"] > 0
    assert json.loads(json.dumps(first["rows"][0]["scores"])) == second["rows"][0]["scores"]
    assert [row["name"] for row in first["rows"]] == [
        "2 blocks of width 16, from instruct",
        "2 blocks of width 16, from base",
        "2 blocks of width 16, tuned 3 times as long, from instruct",
    ]
    for row in first["rows"]:
        drawn = [row["methods"][name]["test"] for name in heterogeneity.RANDOM]
        assert row["scores"]["random"] == pytest.approx(fmean(drawn))
        assert {"task arithmetic", "LATA linear, block", "random"} <= row["scores"].keys()
        assert 0 <= row["spread"] <= 2
        assert row["spread"] == row["spreads"]["block"]
    assert "task arithmetic, anchored" in first["rows"][1]["scores"]


def test_a_variant_that_learned_too_little_is_left_out_and_said(tmp_path, monkeypatch):
    def refused(chain, variant, protocol):
        if protocol == "base":
            raise LataError("every expert must be better, and compute is not: train it longer")
        return {"name": heterogeneity.row_name(variant, protocol), "cpu_minutes": 0.5}

    monkeypatch.setattr(heterogeneity, "measured", refused)
    found = heterogeneity.run(tmp_path, 0, (Variant(TOY),), data=tmp_path)
    assert [row["name"] for row in found["rows"]] == ["2 blocks of width 16, from instruct"]
    assert found["cpu_minutes"] == {"training": 0.0, "evaluation": 0.5}
    assert found["left_out"] == {"2 blocks of width 16, from base": "every expert must be better, and compute is not: train it longer"}
