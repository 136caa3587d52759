import math

import pytest

from lata_lightning.alignment import Alignment, LayerStats
from lata_lightning.display.charts import alignment_over_training, as_text, axis_title, clip, extremes, ink_on, short_names


def alignment(**values):
    return Alignment("block", "instruct", {name: LayerStats(value, None, 1.0, 1.0) for name, value in values.items()}, {})


@pytest.mark.parametrize(
    ("names", "short", "prefix"),
    [
        (["model.layers.0", "model.layers.10"], ("0", "10"), "model.layers"),
        (["encoder.block.0", "decoder.block.0"], ("encoder.block.0", "decoder.block.0"), ""),
        (["h.0.mlp", "h.0.norm"], ("mlp", "norm"), "h.0"),
        (["h", "h.0"], ("h", "h.0"), ""),
        (["model.layers.0"], ("model.layers.0",), ""),
        ([], (), ""),
    ],
)
def test_names_lose_the_components_they_share(names, short, prefix):
    assert short_names(names) == (short, prefix)


def test_long_names_keep_their_end():
    assert clip("a" * 30 + ".q_proj") == "…" + "a" * 14 + ".q_proj"
    assert len(clip("a" * 30)) == 22
    assert clip("a" * 22) == "a" * 22


def test_an_axis_says_where_its_names_lie():
    assert axis_title("block", "model.layers") == "block of model.layers"
    assert axis_title("block", "") == "block"


def test_extremes_name_their_layers():
    assert extremes({"a": 0.5, "b": 0.25, "c": 0.3}, ".2f") == "0.25 (b) to 0.50 (a)"
    assert extremes({"a": 0.5}, ".2f") == "0.50 (a)"
    assert extremes({"a": 0.5, "b": 0.5}, ".2f") == "0.50 (all of them)"


def test_no_value_is_a_dash():
    assert (as_text(None, ".4f"), as_text(0.12345, ".4f")) == ("–", "0.1235" if round(0.12345, 4) == 0.1235 else "0.1234")


def test_there_is_no_heat_map_without_alignment():
    assert alignment_over_training([]) is None
    assert alignment_over_training([(1, 0, alignment(a=None))]) is None


def test_a_heat_map_says_whether_layers_can_be_ranked():
    assert "Spread 0.0400: too flat to rank, so it is drawn in grey." in alignment_over_training([(1, 0, alignment(a=0.5, b=0.54))]).summary
    assert "flat" not in alignment_over_training([(1, 0, alignment(a=0.5, b=0.6))]).summary


def luminance(*channels):
    """As the recommendation words it: for each channel two cases, then a weighted sum."""
    linear = [channel / 12.92 if channel <= 0.04045 else math.pow((channel + 0.055) / 1.055, 2.4) for channel in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", [(level / 20, 0.5, 1 - level / 20) for level in range(21)] + [(level / 20,) * 3 for level in range(21)])
def test_text_stands_out_from_every_colour(colour):
    ink = 0.0 if ink_on(*colour) == "#000000" else 1.0
    lighter, darker = sorted((luminance(*colour), ink), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5
