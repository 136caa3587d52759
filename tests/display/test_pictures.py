import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.image import imread

from lata_lightning.display.charts import HeatMap, Lines, Series
from lata_lightning.display.pictures import draw, pixels, save
from lata_lightning.errors import OutputError


def heat_map(values=((0.5, None), (0.25, 1.0)), **changes):
    names = tuple(f"h.{number}" for number in range(len(values)))
    columns = tuple(f"step {number}" for number in range(len(values[0])))
    given = {
        "key": "heat",
        "title": "Costs $x$ and $y$",
        "summary": "",
        "rows": names,
        "columns": columns,
        "values": values,
        "row_title": "block",
        "column_title": "steps",
        "value_title": "alignment",
        "row_ticks": names,
        "column_ticks": columns,
    }
    return HeatMap(**(given | changes))


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_a_heat_map_shows_the_values_of_its_cells_with_the_first_row_on_top():
    figure = draw(heat_map())
    axes = figure.axes[0]
    assert not any(isinstance(artist, QuadMesh) for artist in axes.collections)
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), [[0.5, np.nan], [0.25, 1.0]])
    assert texts(axes) == ["0.5000", "0.2500", "1.0000"]
    assert axes.yaxis_inverted()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["h.0", "h.1"]


def test_a_diverging_scale_has_zero_in_its_middle():
    assert draw(heat_map(((0.5, -0.1), (0.25, 0.1)), diverging=True)).axes[0].images[0].get_clim() == (-0.5, 0.5)


def test_equal_values_have_a_colour():
    assert draw(heat_map(((0.5, 0.5), (0.5, 0.5)))).axes[0].images[0].get_clim() == (0.0, 1.0)


def test_a_large_heat_map_has_fewer_labels_and_no_numbers():
    values = tuple(tuple(float(row + column) for column in range(100)) for row in range(90))
    axes = draw(heat_map(values)).axes[0]
    assert texts(axes) == []
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"h.{number}" for number in range(0, 90, 3)]


def test_lines_have_their_points_and_names_as_they_are():
    series = (Series("_a$b$", 0, {10.0: 1.0, 20.0: None, 30.0: 3.0}), Series("second\x07", 9, {10.0: 2.0}))
    axes = draw(Lines("lines", "title", "", "steps", "norm", series)).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[10, 1], [20, np.nan], [30, 3]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [r"_a\$b\$", "second "]


def test_lines_over_layers_stand_in_the_order_of_the_layers():
    chart = Lines("lines", "title", "", "block", "norm", (Series("run", 0, {"h.1": 2.0, "h.0": 1.0}),), {"h.0": "0", "h.1": "1"})
    axes = draw(chart).axes[0]
    assert sorted(map(tuple, axes.lines[0].get_xydata())) == [(0, 1), (1, 2)]
    assert axes.get_legend() is None


def test_a_chart_is_saved_as_png_and_svg_with_the_same_bytes_each_time(tmp_path):
    paths = save(heat_map(), tmp_path / "one")
    assert paths == [tmp_path / "one" / "heat.png", tmp_path / "one" / "heat.svg"]
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in save(heat_map(), tmp_path / "two")]
    assert imread(paths[0]).ndim == 3
    assert paths[1].read_text().startswith("<?xml")


def test_pixels_are_those_of_the_figure():
    figure = draw(heat_map())
    found = pixels(figure)
    width, height = (figure.get_size_inches() * figure.dpi).astype(int)
    assert (found.dtype, found.shape) == (np.uint8, (height, width, 4))
    assert len(np.unique(found.reshape(-1, 4), axis=0)) > 10


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="the figures cannot be written to"):
        save(heat_map(), tmp_path / "file" / "figures")
