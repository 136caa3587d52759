"""``lata report``."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import Command, progress_bar
from lata_lightning.cli.writing import add_writing
from lata_lightning.store.output_policy import end_dry_run


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "paths", metavar="RUN_OR_VECTOR", nargs="+", help="Output directories of runs, saved vectors, or files that lata tune wrote."
    )
    parser.add_argument("--instruction", type=str | None, help="Instruction vector (instruct − base) to measure the vectors along.")
    parser.add_argument("--output", default="report.html", help="File to write; an earlier report there is replaced.")
    parser.add_argument("--figures", type=str | None, help="Directory to write every figure to as well, as PNG and as SVG.")
    parser.add_argument("--check-base", type=bool, default=True, help="Refuse vectors that are known to belong to different weights.")
    add_writing(parser, overwrite=False)


def _run(options: Namespace, command: str) -> None:
    from lata_lightning.report.page import check_extra, check_output, write

    check_extra("plotly", "jinja2", *([] if options.figures is None else ["matplotlib"]))
    check_output(options.output)
    from lata_lightning.report.contents import build
    from lata_lightning.report.reading import open_subjects

    if options.dry_run:
        open_subjects(options.paths)
        end_dry_run(Path(options.output))
    with progress_bar("report") as progress:
        report = build(options.paths, options.instruction, check_base=options.check_base, progress=progress)
    if options.figures is not None:
        from lata_lightning.display.pictures import save

        for chart in report.charts:
            save(chart, options.figures)
        sys.stdout.write(f"{options.figures}: {len(report.charts)} figures as PNG and SVG\n")
    write(report, options.output)
    sys.stdout.write(f"{options.output}\n")


COMMANDS = {
    "report": Command(
        "Show runs and vectors in one page: alignment over training, growth, layers, parts, pairs, scales and provenance.", _arguments, _run
    ),
}
