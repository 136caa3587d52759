"""What a callback draws when it is asked to plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lata_lightning.alignment import Alignment, new_axes
from lata_lightning.display.charts import alignment_over_training
from lata_lightning.errors import LataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


def plot_run(
    measured: Sequence[tuple[int, int, Alignment]], last: Alignment | None, ax: Axes | None = None
) -> tuple[Figure | SubFigure, Axes]:
    """Draw the alignment of every layer over a run; without an instruction vector, or with a single measurement, the last one by layer.

    Args:
        measured: Step, epoch and alignment of each measurement in the history, oldest first.
        last: The last measurement.
        ax: Axes to draw into; by default those of a new figure of pyplot.

    Returns:
        Figure and axes, as the ``plot`` of torchmetrics.

    Raises:
        LataError: Nothing has been measured yet, or matplotlib is not installed.
    """
    if last is None:
        raise LataError("there is nothing to plot yet: the first measurement is taken when the first epoch ends")
    chart = alignment_over_training(measured) if len(measured) > 1 else None
    if chart is None:
        return last.plot(ax)
    axes = new_axes() if ax is None else ax
    from lata_lightning.display.pictures import draw_on

    draw_on(chart, axes)
    return axes.figure, axes
