import base64
import gzip
import hashlib
import html
import json
import re

import pytest
from report_inputs import HOSTILE, embedded, row, table_of, write_run, write_vectors

from lata_lightning.cli.main import main
from lata_lightning.errors import LataError, OutputError
from lata_lightning.report import page
from lata_lightning.report.contents import build


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", [row(10, {"h.0": 0.9, "h.1": 0.8}), row(20, {"h.0": 0.7, "h.1": 0.6}, epoch=1)])


def test_the_values_in_the_page_are_those_of_the_history(run):
    text = page.render(build([run]))
    trace = embedded(text, "alignment-1")["data"][0]
    assert trace["z"] == [[0.9, 0.8], [0.7, 0.6]]
    assert (trace["x"], trace["y"]) == (["h.0", "h.1"], ["step 10, epoch 0", "step 20, epoch 1"])
    assert embedded(text, "growth-norm")["data"][0]["x"] == [10, 20]
    assert embedded(text, "growth-norm")["data"][0]["y"] == [1.0, 2.0]


def test_every_figure_has_a_name_a_summary_and_a_table_of_its_values(run):
    report = build([run])
    text = page.render(report)
    assert len(re.findall("<figure ", text)) == len(report.charts) > 0
    for chart in report.charts:
        assert f'aria-labelledby="{chart.key}-title" aria-describedby="{chart.key}-summary"' in text
        assert f'<p id="{chart.key}-summary" class="summary">{html.escape(chart.summary)}</p>' in text
        head, rows = chart.table()
        assert table_of(text, chart.key) == [head, *rows]
    assert table_of(text, "alignment-1") == [
        ["optimizer steps", "h.0", "h.1"],
        ["step 10, epoch 0", "0.9000", "0.8000"],
        ["step 20, epoch 1", "0.7000", "0.6000"],
    ]


def test_nothing_that_comes_from_files_is_markup(tmp_path):
    name = HOSTILE.replace("/", "")
    path = write_run(tmp_path / name, [row(1, {f"h.{HOSTILE}.0": 0.5, "h.1": 0.1})])
    (path / "tune.json").write_text(json.dumps({"points": [{"scale": 1, "scores": {HOSTILE: 0.5}}]}))
    text = page.render(build([path]))
    assert "<script>alert" not in text
    assert html.escape(f"h.{HOSTILE}.0") in text.replace("&#39;", "&#x27;")
    # Scripts of the page: theme, plotly, page, and the data of the figures.
    data = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)
    assert len(re.findall(r"<script[ >]", text)) == 2 + 1 + len(data)
    assert all("<" not in entry for entry in data)


def test_the_page_names_no_file_to_fetch_and_allows_only_its_own_scripts(run):
    text = page.render(build([run]))
    assert not re.search(r"""<(script|img|link|iframe|object|source)\b[^>]*\b(src|href)=""", text)
    policy = html.unescape(re.search(r'Content-Security-Policy" content="(.*?)"', text).group(1))
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    inline = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in inline]
    assert len(hashes) == 2
    packed = re.search(r'<script type="text/plain" id="plotly">(.*?)</script>', text).group(1)
    unpacked = gzip.decompress(base64.b64decode(packed))
    assert b"plotly.js (cartesian - minified)" in unpacked[:200]
    allowed = [hashes[0], base64.b64encode(hashlib.sha256(unpacked).digest()).decode(), hashes[1]]
    assert re.findall(r"'sha256-(.*?)'", policy) == allowed


def test_the_page_is_small(run):
    assert len(page.render(build([run])).encode()) < 1.5e6


def test_the_same_runs_give_the_same_page(run):
    assert page.render(build([run])) == page.render(build([run]))


def test_the_command_writes_the_page_and_the_figures(tmp_path, capsys):
    write_vectors(tmp_path)
    vectors = [str(tmp_path / name) for name in ("math", "string")]
    arguments = [*vectors, "--instruction", str(tmp_path / "instruction"), "--output", str(tmp_path / "deep" / "report.html")]
    assert main(["report", *arguments, "--figures", str(tmp_path / "figures")]) == 0
    text = (tmp_path / "deep" / "report.html").read_text("utf-8")
    keys = re.findall(r'<figure id="(.*?)"', text)
    assert {"coefficients", "pairs-whole", "pairs-by-block", "part-alignments-2"} <= set(keys)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {f"{key}.{end}" for key in keys for end in ("png", "svg")}
    assert capsys.readouterr().out == f"{tmp_path / 'figures'}: {len(keys)} figures as PNG and SVG\n{tmp_path / 'deep' / 'report.html'}\n"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_an_earlier_report_is_replaced_and_no_other_file(tmp_path, run, capsys):
    report = tmp_path / "report.html"
    for _ in range(2):
        assert main(["report", str(run), "--output", str(report)]) == 0
    report.write_text("notes")
    assert main(["report", str(run), "--output", str(report)]) == 1
    assert "exists and is no report" in capsys.readouterr().err
    assert report.read_text() == "notes"
    assert main(["report", str(run), "--output", str(tmp_path)]) == 1
    assert "is a directory; name the file to write" in capsys.readouterr().err


def test_an_output_below_a_file_is_refused_and_leaves_nothing(tmp_path, run):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        page.write(build([run]), tmp_path / "file" / "report.html")


def test_a_missing_library_gives_one_line_that_says_what_to_install(run, tmp_path, monkeypatch, capsys):
    found = page.find_spec
    monkeypatch.setattr(page, "find_spec", lambda name: None if name == "plotly" else found(name))
    assert main(["report", str(run), "--output", str(tmp_path / "report.html")]) == 1
    assert capsys.readouterr().err == ("lata: error: a report needs plotly, which is not installed: pip install 'lata_lightning[report]'\n")
    with pytest.raises(LataError, match="a report needs plotly"):
        page.render(build([run]))
