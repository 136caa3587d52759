"""The results of the quickstart: one JSON file, and tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path

from rich.table import Table

from lata_lightning.display.tables import plain_table, show
from lata_lightning.store.writer import write_json

RESULTS_NAME = "results.json"
TABLES_NAME = "results.txt"
_HEADINGS = ("math", "string", "instruct", "unwanted", "perplexity")


@dataclass(frozen=True)
class ScoreRow:
    """Test scores of one model.

    Attributes:
        name: Name of the model or method.
        scores: Score by group; None if forgetting did not reach the residual of the comparison.
        scale: The scale chosen on validation; None where there is none.
        curve: Validation score (or residual) at every scale that was tried.
    """

    name: str
    scores: Mapping[str, float] | None
    scale: float | None = None
    curve: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Results:
    """All rows: single models, merges of the two experts, and the target before and after forgetting."""

    models: list[ScoreRow]
    merges: list[ScoreRow]
    forgetting: list[ScoreRow]
    residual: float

    def save(self, directory: Path) -> None:
        """Write the tables as text and then ``results.json``, whose presence says that the run is complete."""
        text = StringIO()
        show(*self.tables(), file=text)
        (directory / TABLES_NAME).write_text(text.getvalue(), "utf-8")
        partial = directory / f".{RESULTS_NAME}"
        write_json(partial, asdict(self))
        partial.replace(directory / RESULTS_NAME)

    @classmethod
    def load(cls, directory: Path) -> Results | None:
        """Read the results of a finished run; None if there are none."""
        path = directory / RESULTS_NAME
        if not path.is_file():
            return None
        data = json.loads(path.read_text("utf-8"))
        models, merges, forgetting = ([ScoreRow(**row) for row in data[key]] for key in ("models", "merges", "forgetting"))
        return cls(models, merges, forgetting, data["residual"])

    def tables(self) -> list[Table]:
        """Return the tables of test scores: exact match in percent, and perplexity per byte."""
        return [
            _table(
                "Single models, test scores (exact match in %; perplexity per byte of unseen text, lower is better)",
                self.models,
                ("model",),
            ),
            _table(
                "instruct + scale · (math + string): scale chosen on validation by the mean of math, string and instruct",
                self.merges,
                ("merge", "scale"),
                mean_of=("math", "string", "instruct"),
            ),
            _table(
                f"target − scale · unwanted: at the scale where validation says that {self.residual:.0%} of the unwanted answers are left",
                self.forgetting,
                ("forgetting", "scale"),
                mean_of=("string", "instruct"),
            ),
        ]


def _table(title: str, rows: Sequence[ScoreRow], first: Sequence[str], mean_of: Sequence[str] = ()) -> Table:
    means = [f"mean of {' + '.join(mean_of)}"] if mean_of else []
    return plain_table([*first, *_HEADINGS, *means], (list(_cells(row, "scale" in first, mean_of)) for row in rows), title)


def _cells(row: ScoreRow, with_scale: bool, mean_of: Sequence[str]) -> Iterable[str]:
    yield row.name
    if with_scale:
        yield "–" if row.scale is None else f"{row.scale:.3g}"
    for heading in _HEADINGS:
        if row.scores is None:
            yield "not reached"
        else:
            yield f"{row.scores[heading]:.3f}" if heading == "perplexity" else f"{100 * row.scores[heading]:.1f}"
    if mean_of:
        scores = row.scores
        yield "–" if scores is None else f"{100 * sum(scores[group] for group in mean_of) / len(mean_of):.1f}"
