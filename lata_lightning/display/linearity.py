"""A picture of non-linearity scores over depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lata_lightning.errors import LataError, OutputError
from lata_lightning.linearity.scores import MODEL, Linearity
from lata_lightning.store.writer import check_free

_STYLES = {"block": "-", "attention": "--", "cross_attention": "-.", "mlp": ":"}


def save_figure(measured: Sequence[Linearity], path: str | Path) -> None:
    """Write a picture of the scores of blocks and their parts over depth: one panel for branches, one for block outputs, one colour for each vector.

    Args:
        measured: The scores of each vector.
        path: A new file; its suffix decides the format, such as ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        LataError: matplotlib is not installed, or does not support the format.
        OutputError: The file exists, or cannot be written.
    """
    target = Path(path)
    check_free(target)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LataError("a figure needs matplotlib: pip install 'lata_lightning[report]'") from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    known = figure.canvas.get_supported_filetypes()
    if target.suffix.removeprefix(".") not in known:
        raise LataError(f"{target} must end in the suffix of a picture: one of {', '.join(sorted(known))}")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, side, title in zip(panels, ("branch", "output"), ("what the module adds", "output of the block"), strict=True):
        for number, linearity in enumerate(measured):
            for part, style in _STYLES.items():
                points = [(score.depth, getattr(score, side)) for score in linearity.scores if score.part == part]
                drawn = [(depth, value) for depth, value in points if value is not None]
                if drawn:
                    depths, values = zip(*drawn, strict=True)
                    panel.plot(depths, values, style, color=f"C{number}", marker=".", label=f"{linearity.vector}: {part}")
            whole = next(score.output for score in linearity.scores if score.part == MODEL)
            if side == "output" and whole is not None:
                panel.axhline(whole, color=f"C{number}", linewidth=0.8, alpha=0.6, label=f"{linearity.vector}: whole model")
        panel.set(title=title, xlabel="block")
        panel.set_yscale("symlog", linthresh=1e-4)
    panels[0].set_ylabel("non-linearity score (0: linear)")
    panels[1].legend(fontsize="x-small")
    try:
        figure.savefig(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from error
