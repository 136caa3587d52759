"""What the callbacks of Lightning and of transformers show of the run that they follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lata_lightning.alignment import Alignment
from lata_lightning.callbacks.arguments import RunArguments
from lata_lightning.callbacks.plots import plot_run
from lata_lightning.callbacks.run import Run
from lata_lightning.live.history import MeasuredStep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


class RunCallback(RunArguments):
    """The arguments of a callback and the results of its run, the same under every trainer."""

    run: Run | None = None
    """The run of the present or last fit; None before the first."""

    @property
    def alignment(self) -> Alignment | None:
        """The last measurement; with coefficients once training has ended."""
        return None if self.run is None else self.run.alignment

    @property
    def history(self) -> Sequence[MeasuredStep]:
        """What this process has measured in the present or last run, oldest first."""
        return () if self.run is None else self.run.monitor.history

    def plot(self, ax: Axes | None = None) -> tuple[Figure | SubFigure, Axes]:
        """Draw the alignment of every layer over the run, or the last measurement by layer where there is no history of alignments.

        Args:
            ax: Axes of matplotlib to draw into; by default those of a new figure.

        Returns:
            Figure and axes, as the ``plot`` of torchmetrics.

        Raises:
            LataError: Nothing has been measured yet, or matplotlib is not installed.
        """
        return plot_run([], None) if self.run is None else self.run.plot(ax)
