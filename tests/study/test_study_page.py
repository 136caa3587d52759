"""The page of the evidence, made from results that are made up: what it says follows from them, and its figures are there and small."""

import json
import re

import pytest

pytest.importorskip("matplotlib")

from study import figures
from study.cells import ANCHORED, LATA, TASK_ARITHMETIC, as_text, compared, is_random, random_groups, random_rows
from study.heterogeneity import AT_ONE
from study.merging_page import setting_of, spread_and_gain
from study.page import folded, write
from study.rules import METHODS, WITHOUT_SAMPLES
from study.statistics import Interval

SCALES = ("0", "0.5", "1")
RANDOM = [f"random {rule} {number}" for rule in ("linear", "log") for number in range(1, 6)]


def noise(seed, name):
    """A small number that looks random and is the same on every machine."""
    return ((seed * 7919 + sum(map(ord, name)) * 104729) % 97) / 97 * 0.004


def method(seed, name, test, kind="method", scale=0.5):
    validation = {each: 0.3 + (test - 0.3) * (1 - abs(float(each) - scale)) for each in SCALES}
    own = test + noise(seed, name)
    parts = {
        "test_details": {"instruct": own + 0.2, "base perplexity": 10 * own},
        "test_kept": {"compute": own - 0.3, "reverse": own + 0.1},
    }
    row = {"kind": kind, "onto": "instruct", "tuned": False, "validation": validation, "scale": scale, "test": own, "untuned": own - 0.1}
    return row | parts


def merging(seed, *, protocol="instruct", track="skills", extra=None):
    rows = {TASK_ARITHMETIC: method(seed, "t", 0.5), LATA: method(seed, "l", 0.5), "better": method(seed, "b", 0.6, "candidate")}
    rows |= {name: method(seed, name, 0.5, "control") for name in RANDOM}
    rows |= {"worse log": method(seed, "w", 0.4, scale=1.0)} | (extra or {})
    if protocol == "base":
        rows[ANCHORED] = method(seed, "a", 0.55, "control")
    scores = {"compute": 0.2, "reverse": 0.1, "instruct": 0.9, "base perplexity": 4.5}
    return {
        "part": "merging",
        "seed": seed,
        "setting": {"track": track, "protocol": protocol, "experts": ["compute", "reverse"]},
        "reference": {"start": scores, "instruct": scores, "experts": {"compute": scores, "reverse": scores}},
        "methods": rows,
        "alignment": {"a": [0.9, 0.8], "b": [0.95, 0.7]},
        "relative_norm": {"a": [0.3, 0.3], "b": [0.2, 0.4]},
        "spread": {"block": [0.05, 0.1]},
        "headroom": 0.7 + 0.01 * seed,
        "machine": "a machine",
        "cpu_minutes": {"training": 6.0, "evaluation": 2.0},
    }


def scored(left, kept):
    return {"unwanted": left, "useful": kept, "instruct": kept, "perplexity": 5.0}


def forgetting(seed):
    target = {"validation": scored(1.0, 0.8), "test": scored(1.0, 0.8)}

    def row(kept, kind, reached=True):
        curve = [{"scale": 0.0, **scored(1.0, 0.8)}, {"scale": 1.0, **scored(0.05, kept)}]
        at = {"scale": 1.0, "test": scored(0.1, kept + noise(seed, kind))}
        return {"kind": kind, "norm": 1.0, "curve": curve, "at": {"0.5": at, "0.1": at if reached else None}}

    methods = {"negation": row(0.2, "baseline"), "LATA linear": row(0.6, "method"), "LATA threshold": row(0.2, "method", reached=False)}
    methods["trimmed"] = row(0.2, "baseline", reached=seed < 2)
    methods |= {f"random {number}": row(0.3, "control") for number in range(1, 6)}
    case = {"target": target, "methods": methods, "spread": 0.1}
    return {
        "part": "forgetting",
        "seed": seed,
        "unwanted": "encode",
        "useful": "reverse",
        "residuals": [0.5, 0.1],
        "cases": {"unknown": case},
        "cpu_minutes": 1.0,
    }


def continual(seed):
    def row(kind, accuracy):
        own = accuracy + noise(seed, kind)
        return {
            "kind": kind,
            "matrix": [[0.9, 0.1, 0.1], [own + 0.1, own + 0.1, 0.1], [own, own, own]],
            "instruct": [0.9, 0.85, 0.8],
            "scales": None,
            "average_accuracy": own,
            "backward_transfer": -0.1,
            "forward_transfer": None,
            "forgetting": 0.1,
        }

    methods = {
        "sequential fine-tuning": row("baseline", 0.4),
        TASK_ARITHMETIC: row("method", 0.5),
        LATA: row("candidate", 0.6),
        **{name: row("control", 0.5) for name in RANDOM},
    }
    return {
        "part": "continual",
        "seed": seed,
        "tasks": ["reverse", "encode", "sort"],
        "reference": [0.1, 0.1, 0.1],
        "alone": [0.9, 0.9, 0.9],
        "methods": methods,
        "cpu_minutes": 1.0,
    }


def heterogeneity(seed):
    rows = [
        {
            "name": f"{blocks} blocks, from {start}",
            "spread": 0.01 * blocks,
            "rank_correlation": 0.9,
            "headroom": 0.7,
            "scores": {TASK_ARITHMETIC: 0.4, LATA: 0.5 + noise(seed, f"{start} {blocks}"), "random": 0.45, "blocks only": 0.4}
            | {"LATA linear, outside 1": 0.6}
            | ({ANCHORED: 0.48} if start == "base" else {}),
            "methods": {LATA: {"scale": 0.5 + 0.5 * (seed % 2)}},
        }
        for blocks in (8, 16, 24)
        for start in ("instruct", "base")
    ]
    return {"part": "heterogeneity", "seed": seed, "rows": rows, "cpu_minutes": 1.0}


def page_of(folder, *results):
    folder.mkdir(exist_ok=True)
    for number, result in enumerate(results):
        (folder / f"{result['part']}-{number}.json").write_text(json.dumps(result))
    return write(folder)


def cells(text, name, after=""):
    """The cells of the first row with this name below a place of the page."""
    (row,) = re.findall(rf"^\| \**{re.escape(name)}\** \| (.*) \|$", text.split(after, 1)[1] if after else text, re.MULTILINE)[:1]
    return row.split(" | ")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page of five seeds of everything, and the folder of its results."""
    folder = tmp_path_factory.mktemp("results") / "methods"
    results = [make(seed) for seed in range(5) for make in (merging, forgetting, continual, heterogeneity)]
    results += [merging(seed, protocol="base", track="text") for seed in range(5)]
    return page_of(folder, *results), folder


def test_the_page_gives_the_verdict_of_the_decision_rule(whole):
    text, _ = whole
    place = "### Skills, experts from instruct"
    assert cells(text, "better", place)[-1] == "wins"
    assert "| **better** |" in text
    assert cells(text, LATA, place)[-1] == "not separated"
    assert cells(text, "worse log", place)[-1] == "loses"
    assert cells(text, TASK_ARITHMETIC, place)[-1] == "–"


def test_rows_stand_from_the_best_to_the_worst(whole):
    text, _ = whole
    rows = re.findall(
        r"^\| \**(better|LATA linear, block|worse log)\** \|", text.split("### Skills, experts from instruct")[1], re.MULTILINE
    )
    assert rows[:3] == ["better", LATA, "worse log"]


def test_random_rows_are_shown_as_their_mean_by_rule(whole):
    text, _ = whole
    assert "| random linear 1 |" not in text
    for rule in ("linear", "log"):
        assert cells(text, f"random ranks, {rule}, mean of 5")[0] == "control"
    assert cells(text, "random ranks, mean of 5", "## Forgetting")[0] == "control"
    assert cells(text, "random ranks, linear, mean of 5", "## Continual")[0] == "control"


def test_scores_are_means_over_the_seeds_with_their_interval(whole):
    text, _ = whole
    scores = [100 * (0.6 + noise(seed, "b")) for seed in range(5)]
    mean = sum(scores) / 5
    half = 2.776445 * (sum((score - mean) ** 2 for score in scores) / 4) ** 0.5 / 5**0.5
    assert cells(text, "better")[2] == f"{mean:.1f} ± {half:.1f}"


def test_headroom_says_which_settings_can_tell_methods_apart(whole, tmp_path):
    text, _ = whole
    assert re.search(r"^\| skills, experts from instruct: compute, reverse \| 5 \| 72\.0 ± 2\.0 \| yes \|$", text, re.MULTILINE)
    flat = page_of(tmp_path / "methods", *({**merging(seed), "headroom": 0.95} for seed in range(5)))
    assert "| 5 | 95.0 ± 0.0 | no |" in flat
    # Where they cannot be told apart nothing wins or loses.
    assert cells(flat, "better", "### Skills, experts from instruct")[-1] == "–"
    assert "| **better** |" not in flat


def test_experts_from_base_are_compared_with_anchored_task_arithmetic_too(whole):
    text, _ = whole
    place = "### Text, experts from base"
    assert "| − task arithmetic | − anchored | − random |" in text.split(place)[1]
    assert cells(text, LATA, place)[4].startswith("-5.")
    assert cells(text, "random ranks, linear, mean of 5", place)[4].startswith("-")
    assert "− anchored" not in text.split("### Skills, experts from instruct")[1].split("###")[0]


def test_the_gain_of_lata_counts_from_task_arithmetic_onto_the_same_model():
    gains = [100 * (0.5 + noise(seed, "l") - 0.55 - noise(seed, "a")) for seed in range(2)]
    found = spread_and_gain([merging(seed, protocol="base") for seed in range(2)])
    assert found == [(pytest.approx(0.075), pytest.approx(gain)) for gain in gains]
    (from_instruct,) = spread_and_gain([merging(0)])
    assert from_instruct[1] == pytest.approx(100 * (noise(0, "l") - noise(0, "t")))


def test_a_best_scale_at_the_end_of_the_grid_is_marked(whole):
    text, _ = whole
    assert cells(text, "worse log")[5] == "1 (end of grid)"
    assert cells(text, "better")[5] == "0.5"


def test_forgetting_says_what_is_kept_and_which_residuals_are_not_reached(whole):
    text, _ = whole
    kept = sum(100 * (0.6 + noise(seed, "method")) / 0.8 for seed in range(5)) / 5
    row = cells(text, "LATA linear", "## Forgetting")
    assert row[1:3] == ["5", f"{kept:.0f} / {kept:.0f}"]
    assert row[-1] == "wins"
    lacking = cells(text, "LATA threshold", "## Forgetting")
    assert lacking[3:5] == ["not reached", "–"]
    assert lacking[-1] == "–"
    # What is reached in some seeds only is not compared.
    partly = cells(text, "trimmed", "## Forgetting")
    assert partly[3].endswith("(2 of 5)")
    assert partly[-3:] == ["–", "–", "–"]


def test_measures_without_a_value_are_a_dash(whole):
    text, _ = whole
    row = cells(text, LATA, "## Continual")
    assert row[1] == "5"
    assert row[3:5] == ["-10.0 ± 0.0", "–"]
    assert row[-1] == "80.0 ± 0.0"


def test_continual_verdicts_stand_only_at_stages_that_can_tell_methods_apart(whole):
    text, _ = whole
    place = "Accuracy on the tasks learned so far"
    assert cells(text, "task arithmetic keeps of the gain, %", place) == ["63", "50"]
    gained = sum(100 * (0.1 + noise(seed, "candidate") - noise(seed, "method")) for seed in range(5)) / 5
    two, three = cells(text, LATA, place)
    assert two.split("(")[1].startswith(f"+{gained:.1f}")
    assert two.endswith(", wins)")
    assert three.split("(")[1].startswith(f"+{gained:.1f}")
    assert "wins" not in three
    assert cells(text, "random ranks, log, mean of 5", place)[0].startswith("60.")
    assert "(" not in cells(text, TASK_ARITHMETIC, place)[0]
    assert ", loses)" in cells(text, "sequential fine-tuning", place)[0]


def test_what_is_kept_is_shown_by_task_with_instruct_skills_and_perplexity(whole):
    text, _ = whole
    place = text.split("By task, on test", 1)[1]
    mean = sum(0.5 + noise(seed, "l") for seed in range(5)) / 5
    compute, reverse, instruct, perplexity = (float(cell.split(" ")[0]) for cell in cells(place, LATA))
    assert (compute, reverse) == (pytest.approx(100 * mean - 30, abs=0.06), pytest.approx(100 * mean + 10, abs=0.06))
    assert (instruct, perplexity) == (pytest.approx(100 * mean + 20, abs=0.06), pytest.approx(10 * mean, abs=0.006))
    assert "lata regress" not in place.split("![")[0]


def test_heterogeneity_counts_lata_from_task_arithmetic_onto_the_same_model(whole):
    text, _ = whole
    *_, against, blocks, chance, whole_outside, scale, last = cells(text, "8 blocks, from instruct")
    assert [each.split(".")[0] for each in (against, blocks, chance, whole_outside)] == ["+10", "+10", "+5", "+20"]
    assert (scale, last) == ("0.5", "–")
    assert cells(text, "8 blocks, from base")[-6].startswith("+2.")
    assert cells(text, "8 blocks, from base")[-3].startswith("+12.")


def test_the_merge_without_samples_is_shown_at_scale_one_over_the_seeds_that_have_it(tmp_path):
    found = [heterogeneity(seed) for seed in range(3)]
    for result in found[1:]:
        for row in result["rows"]:
            row["scores"][AT_ONE] = 0.43
    assert cells(page_of(tmp_path / "methods", *found), "8 blocks, from base")[-1] == "+3.0 ± 0.0 (2)"


def test_heterogeneity_correlates_spread_and_gain_over_the_models_of_each_seed(tmp_path):
    found = [heterogeneity(seed) for seed in range(5)]
    for number, result in enumerate(found):
        for row in result["rows"]:
            # From instruct LATA gains more with every wider spread, in each seed at a height of its own; from base it always gains less.
            gain = (row["spread"] if ANCHORED not in row["scores"] else -row["spread"]) + 0.2 * number
            row["scores"] |= {LATA: row["scores"][TASK_ARITHMETIC] + gain}
            row["scores"] |= {"random": row["scores"][LATA] + row["spread"]}
    text = page_of(tmp_path / "methods", *found)
    for said in (
        "+1.00 ± 0.00 over task arithmetic with experts from instruct",
        "-1.00 ± 0.00 over random ranks with experts from instruct",
        "-1.00 ± 0.00 over task arithmetic with experts from base",
    ):
        assert said in text


def test_models_with_one_and_the_same_gain_have_no_correlation(tmp_path):
    found = heterogeneity(0)
    for row in found["rows"]:
        row["scores"] |= {LATA: 0.5, "random": 0.5}
    text = page_of(tmp_path / "methods", found)
    assert "## Heterogeneity" in text
    assert "Spearman" not in text


def test_models_that_learned_too_little_are_named_with_the_reason(tmp_path):
    text = page_of(
        tmp_path / "methods", heterogeneity(0) | {"left_out": {"24 blocks, from base": "sort learned nothing"}}, heterogeneity(1)
    )
    assert "- Seed 0, 24 blocks, from base: sort learned nothing" in text


def test_every_figure_of_the_page_is_there_small_and_the_same_again(whole):
    text, folder = whole
    linked = re.findall(r"!\[[^]]+]\(([^)]+)\)", text)
    assert len(linked) == len(set(linked)) == 6
    before = {name: (folder.parent / name).read_bytes() for name in linked}
    assert all(data.startswith(b"<?xml") and len(data) < 100_000 for data in before.values())
    assert {path.name for path in folder.glob("*.svg")} == {name.removeprefix("methods/") for name in linked}
    assert write(folder) == text
    assert {name: (folder.parent / name).read_bytes() for name in linked} == before


def test_no_two_of_many_lines_look_alike():
    styles = [figures._style(number) for number in range(3 * len(figures.COLOURS))]
    assert len({(style["color"], style["marker"]) for style in styles}) == len(styles)


@pytest.mark.parametrize("rows", [12, 13])
def test_only_long_tables_open_on_a_click(rows):
    table = ["| row |", "|---|", *(f"| {number} |" for number in range(rows))]
    page = folded(["Before.", "", *table, "", "After."])
    assert [line for line in page if line.startswith("|")] == table
    assert page[0] == "Before."
    assert page[-1] == "After."
    opened = ["<details><summary>The table of all 13 rows</summary>", "</details>"]
    assert [line for line in page if "details>" in line] == (opened if rows == 13 else [])


def test_the_page_is_written_beside_its_folder(whole):
    text, folder = whole
    assert folder.with_suffix(".md").read_text("utf-8") == text
    # Five seeds of 6 minutes of training, which two settings share, 2 · 2 of merging and 3 of the other parts.
    assert "in 65 minutes of one core" in text
    assert "Seeds: 0, 1, 2, 3, 4." in text


def test_development_seeds_decide_nothing(tmp_path):
    seeds = [merging(seed) for seed in range(100, 106)]
    text = page_of(tmp_path / "methods", *seeds, forgetting(100))
    assert "On the development seeds 100, 101, 102, 103, 104, 105, from which candidates were chosen and which decide nothing" in text
    assert "6 (development)" in text
    assert "wins |" not in text
    assert "loses |" not in text
    both = page_of(tmp_path / "methods", *seeds, *(merging(seed) for seed in range(5)))
    assert both.index("| wins |") < both.index("On the development seeds")
    assert "wins |" not in both.split("On the development seeds")[1]


def test_a_row_that_a_seed_lacks_is_shown_with_the_number_of_its_seeds(tmp_path):
    text = page_of(tmp_path / "methods", *(merging(seed, extra={"new": method(seed, "n", 0.5)} if seed else None) for seed in range(5)))
    assert cells(text, "new")[1] == "4"
    assert cells(text, "new")[-1] == "–"
    assert cells(text, "better")[1] == "5"


def first_screen(seed, **made):
    """A result of the rows that every seed runs, with a row that is better at scale 1 than task arithmetic is anywhere."""
    result = merging(seed, **made)
    row = result["methods"][WITHOUT_SAMPLES] = method(seed, "r", 0.6, "candidate")
    row["untuned"] = 0.58 + noise(seed, "u")
    return result


def test_the_rows_of_every_seed_are_compared_at_scale_one_and_at_their_best(tmp_path):
    folder = tmp_path / "methods"
    page_of(folder, *(merging(seed) for seed in range(5)))
    page_of(folder / "first-screen", *(first_screen(seed) for seed in range(10)), *(first_screen(seed, track="text") for seed in range(5)))
    text = write(folder)
    gained = [100 * (0.58 + noise(seed, "u") - 0.5 - noise(seed, "t")) for seed in range(10)]
    best, other = cells(text, WITHOUT_SAMPLES, "**Nothing tuned**:")
    assert best.startswith(f"**+{sum(gained) / 10:.1f} ± ")
    assert best.endswith("** (10; < 0.001)")
    assert other.endswith("** (5; < 0.001)")
    # Task arithmetic itself loses 10 points at scale 1 in these results, and is compared with nothing where both sides are its own.
    assert cells(text, TASK_ARITHMETIC, "**Nothing tuned**:")[0].startswith("-10.0")
    assert cells(text, WITHOUT_SAMPLES, "**Nothing tuned on either side**")[0].startswith("**+18.")
    assert cells(text, WITHOUT_SAMPLES, "**Each at its own best scale**")[0].startswith("**+10.")
    assert cells(text, "task arithmetic can tell", "**Nothing tuned**:") == ["yes: keeps 74 %", "yes: keeps 72 %"]
    assert text.index("## Merging, the rows that every seed runs") < text.index("## Merging, every row")
    assert cells(text, WITHOUT_SAMPLES, "### Skills, experts from instruct")[1] == "10"
    assert (folder / "first-screen" / "spread-and-gain.svg").exists()
    assert "Seeds: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in text


def test_experts_that_are_adapters_are_a_setting_of_their_own():
    result = merging(0)
    assert setting_of(result) == "skills, experts from instruct: compute, reverse"
    result["setting"]["rank"] = 8
    assert setting_of(result) == "skills, experts from instruct by LoRA of rank 8: compute, reverse"


def test_variants_are_ordered_by_their_mean_over_the_settings_and_development_seeds(tmp_path):
    def of(seed, plain, other):
        row = {"plain": {"validation": plain, "test": 0}, "other": {"validation": other, "test": 0}}
        return {"part": "variants", "seed": seed, "settings": {"skills": row, "text": row}, "cpu_minutes": 1.0}

    text = page_of(tmp_path / "methods", of(100, 0.5, 0.7), of(101, 0.6, 0.8))
    assert "Validation score at scale 1 on the seeds 100 and 101, which decide nothing else" in text
    assert re.findall(r"^\| (plain|other) \| (.*) \|$", text, re.MULTILINE) == [
        ("other", "75.0 | 75.0 | 75.0"),
        ("plain", "55.0 | 55.0 | 55.0"),
    ]


def test_one_seed_gives_means_without_intervals_and_no_verdict(tmp_path):
    text = page_of(tmp_path / "methods", merging(0))
    row = cells(text, "better")
    assert "±" not in " ".join(row)
    assert row[-1] == "–"


def test_without_results_the_page_says_how_to_get_some(tmp_path):
    assert "No results yet: run `python -m study seed 0`." in page_of(tmp_path / "methods")


def test_random_rows_of_the_benchmark_are_recognised_and_nothing_else_is():
    assert [name for name in METHODS if is_random(name)] == RANDOM
    assert is_random("random 3")
    assert not is_random("random ranks, linear, mean of 5")
    assert list(random_groups(["random 1", "random 2", "x"]).items()) == [("random ranks, mean of 2", ["random 1", "random 2"])]
    assert {TASK_ARITHMETIC, ANCHORED, LATA} <= set(METHODS)


def test_rows_under_the_log_rule_are_judged_by_random_ranks_under_it():
    assert random_rows("LATA log, block", RANDOM) == RANDOM[5:]
    assert random_rows("LATA linear, block", RANDOM) == random_rows("TIES 0.2", RANDOM) == RANDOM[:5]
    # Where there are none under the log rule, by the others.
    assert random_rows("LATA log", ["random 1", "random 2"]) == ["random 1", "random 2"]


def test_the_mean_of_random_rows_is_compared_with_the_reference_only():
    scores = {TASK_ARITHMETIC: {0: 0.5, 1: 0.6}, "random 1": {0: 0.5, 1: 0.8}, "random 2": {0: 0.7, 1: 0.8}}
    row = compared(scores, TASK_ARITHMETIC)["random ranks, mean of 2"]
    assert row.against_task_arithmetic.mean == pytest.approx(0.15)
    assert row.against_random is None


def test_numbers_are_written_with_their_interval_and_sign():
    assert as_text(Interval(1.25, 0.5, 5), signed=True) == "+1.2 ± 0.5"
    assert as_text(Interval(-1.0, None, 1), signed=True) == "-1.0"
    assert as_text(None) == "–"
