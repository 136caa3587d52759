import re

import pytest
from rich.console import Console

from lata_lightning.alignment import Alignment, LayerStats
from lata_lightning.display.layer_tables import MOST_ROWS, alignment_table, derivation_table, layer_table, sparkline
from lata_lightning.vectors.provenance import Derivation, LayerValues

PREFIX = "model.language_model.layers"


def drawn(table, width=80):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def alignment(values, outside=("model.language_model.embed_tokens.weight",)):
    layers = {f"{PREFIX}.{number}": LayerStats(value, 0.5, 2.0, 4.0, 1.0) for number, value in enumerate(values)}
    return Alignment("block", "instruct", layers, {name: LayerStats(1.0, 0.0, 0.0, 4.0, 0.0) for name in outside})


def rows_of(text):
    """Rows that begin with the number of a layer."""
    return {int(match[1]): match[0] for match in re.finditer(r"^ (\d+) .*$", text, re.MULTILINE)}


@pytest.mark.parametrize("count", [2, 8, 80])
def test_what_all_layers_begin_with_stands_once_and_no_row_is_broken_at_80_columns(count):
    text = drawn(alignment_table(alignment([0.5 + number / (2 * count) for number in range(count)]), "t", every=True))
    assert text.count(PREFIX) == 1
    assert f"(blocks of {PREFIX})" in text
    assert list(rows_of(text)) == list(range(count))
    assert max(map(len, text.splitlines())) <= 80


def test_every_layer_keeps_its_figures():
    rows = rows_of(drawn(alignment_table(alignment([0.25, 0.75]))))
    assert rows[0].split() == ["0", "0.2500", "0.5000", "2", "1.0000", "▏"]
    assert rows[1].split() == ["1", "0.7500", "0.5000", "2", "1.0000", "████████"]


def test_what_lies_outside_keeps_its_whole_name_and_has_no_alignment_where_it_did_not_move():
    text = drawn(alignment_table(alignment([0.25, 0.75])))
    below = [line for line in text[text.index("████████") :].splitlines()[1:] if line.strip()]
    assert below[0].split()[1:] == ["–", "–", "0", "0.0000"]
    # The name goes on in the first column of the lines below.
    name = "".join(line.split()[0] for line in below)
    assert name == "model.language_model.embed_tokens.weight(outside)"


@pytest.mark.parametrize("count", [30, 48, 80])
def test_many_layers_are_cut_to_the_first_the_last_and_the_extremes(count):
    values = [0.5] * count
    values[17], values[20] = 0.1, 0.9
    text = drawn(alignment_table(alignment(values), hint="--all shows them."))
    shown = rows_of(text)
    assert {0, 1, 2, 3, 17, 20, count - 4, count - 3, count - 2, count - 1} <= set(shown)
    assert len(shown) <= MOST_ROWS
    hidden = sum(int(number) for number in re.findall(r"… (\d+) more", text))
    assert hidden == count - len(shown)
    assert f"{hidden} of {count} blocks are not shown. --all shows them." in text
    assert "alignment, first to last:" in text
    assert len(rows_of(drawn(alignment_table(alignment(values), every=True)))) == count


def test_alignments_that_are_too_flat_to_rank_by_get_no_bars():
    text = drawn(alignment_table(alignment([0.50, 0.51])))
    assert not re.search("[▏█]", text)
    assert "too little to rank the layers by" in " ".join(text.split())


def test_rows_that_are_no_layers_take_nothing_from_the_names():
    text = drawn(layer_table("layer", ["score"], {"model": ["1"], "m.layers.0": ["2"], "m.layers.1": ["3"]}))
    assert "(layers of m.layers)" in " ".join(text.split())
    assert re.search(r"^ model +1 *$", text, re.MULTILINE)
    assert re.search(r"^ 1 +3 *$", text, re.MULTILINE)


def test_a_derivation_shows_what_was_measured_by_layer():
    made = Derivation(
        "regression", {}, (), (), (LayerValues("loss", {"m.0": 0.5, "m.1": None}, "a"), LayerValues("loss", {"m.0": 0.25, "m.1": 1.0}, "b"))
    )
    rows = rows_of(drawn(derivation_table(made)))
    assert rows[0].split()[:3] == ["0", "0.5", "0.25"]
    assert rows[1].split()[:3] == ["1", "–", "1"]


def test_a_sparkline_runs_from_the_smallest_to_the_largest_value():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([1.0, None, 1.0]) == "▁ ▁"
    assert sparkline([]) == ""


def test_a_long_sparkline_averages_equal_pieces():
    line = sparkline([0.0] * 60 + [1.0] * 60)
    assert line == "▁" * 30 + "█" * 30
