"""The page: one file with its figures, style and scripts, which loads nothing from the network."""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from lata_lightning.errors import LataError, OutputError
from lata_lightning.report.contents import Report

_PLOTLY = "plotly-cartesian.min.js.gz"
GENERATOR = '<meta name="generator" content="lata_lightning">'


def check_extra(*modules: str) -> None:
    """Raise a LataError unless the libraries of the extra ``report`` are installed.

    Raises:
        LataError: One of them is not installed.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise LataError(f"a report needs {', '.join(missing)}, which is not installed: pip install 'lata_lightning[report]'")


def check_output(path: str | Path) -> None:
    """Refuse to overwrite anything but an earlier report.

    Raises:
        OutputError: The path is a directory, or a file that is not a report.
    """
    target = Path(path)
    if not target.exists():
        return
    if target.is_dir():
        raise OutputError(f"{target} is a directory; name the file to write, such as {target / 'report.html'}")
    with target.open("rb") as file:
        known = GENERATOR.encode() in file.read(2048)
    if not known:
        raise OutputError(f"{target} exists and is no report; choose another --output, or remove it first")


def render(report: Report) -> str:
    """Return the page as text; everything that comes from files is escaped. The same report gives the same page.

    Raises:
        LataError: The extra ``report`` is not installed.
    """
    check_extra("plotly", "jinja2")
    import jinja2

    from lata_lightning.report.interactive import plotly_figure, plotly_json

    packed = files("lata_lightning.report").joinpath(_PLOTLY).read_bytes()
    scripts = {"theme": _asset("theme.js"), "plotly": gzip.decompress(packed).decode(), "page": _asset("page.js")}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("page.html")).render(
        report=report,
        generator=GENERATOR,
        style=_asset("page.css"),
        scripts=scripts,
        # The browser decompresses it: the page is three times smaller, and the policy still allows only this script.
        plotly=base64.b64encode(packed).decode(),
        policy=_policy(list(scripts.values())),
        figures={chart.key: plotly_json(chart) for chart in report.charts},
        heights={chart.key: int(plotly_figure(chart).layout.height) for chart in report.charts},
        tables={chart.key: chart.table() for chart in report.charts},
        version=version("lata_lightning"),
    )


def write(report: Report, path: str | Path) -> None:
    """Write the page atomically.

    Raises:
        OutputError: The path holds something else, or cannot be written.
        LataError: The extra ``report`` is not installed.
    """
    check_output(path)
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    text = render(report)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, "utf-8")
        partial.replace(target)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OutputError(f"{target} cannot be written: {error.strerror}") from error


def _asset(name: str) -> str:
    return files("lata_lightning.report").joinpath(name).read_text("utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """Return a content security policy: nothing is loaded, and only the page's own scripts run, so that names from files cannot inject any."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
