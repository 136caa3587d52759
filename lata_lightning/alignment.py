"""The alignment of each layer of a fine-tune with instruction following."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lata_lightning.errors import LataError
from lata_lightning.layers import LayerMap, Level
from lata_lightning.moments import Moments, Start, check_start, total

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

FLAT_SPREAD = 0.05
"""A smaller spread of the alignments is too small to rank layers by: in experiments on small models, ranks from spreads of 0.02 to 0.1 did no better than
random ranks."""
NORM_CORRELATION = 0.9
"""Above this absolute rank correlation, ranking by alignment amounts to ranking by relative norm."""
RANKING = ("alignment_spread", "alignment_too_flat_to_rank", "alignment_norm_correlation", "alignment_ranks_by_relative_norm")
"""Keys of the figures that say whether a ranking means anything."""
_FEWEST_RANKED = 4
"""With fewer layers, such a high rank correlation occurs by chance more than one time in ten."""


@dataclass(frozen=True)
class LayerStats:
    """Measurements of one layer; norms are in the units of the weights.

    Attributes:
        alignment: cos(complex vector, instruction vector); None where it is undefined.
        relative_norm: ‖task vector‖ / ‖instruction vector‖; None where the instruction vector is zero.
        task_norm: ‖task vector‖.
        instruction_norm: ‖instruction vector‖.
        coefficient: The factor of the layer's task vector; None before a weighting rule has been applied.
    """

    alignment: float | None
    relative_norm: float | None
    task_norm: float
    instruction_norm: float
    coefficient: float | None = None

    @property
    def moved(self) -> bool:
        """Whether the fine-tune changed the layer. One that it did not change has an alignment of 1, which says nothing."""
        return self.task_norm > 0

    @classmethod
    def of(cls, moments: Moments) -> LayerStats:
        """Compute the figures from the three sums of a layer."""
        return cls(moments.alignment, moments.relative_norm, moments.task_norm, moments.instruction_norm)


@dataclass(frozen=True)
class Alignment:
    """Alignment of every layer of one task vector with one instruction vector.

    Attributes:
        level: Unit of weighting: block, submodule or tensor.
        start: The kind of model that the fine-tune started from.
        layers: The ranked layers, in the order in which the model runs them.
        outside: The tensors that belong to no layer, by tensor name.
    """

    level: Level
    start: Start
    layers: Mapping[str, LayerStats]
    outside: Mapping[str, LayerStats]

    @property
    def values(self) -> dict[str, float]:
        """Alignment of each layer where it is defined."""
        return {name: stats.alignment for name, stats in self.layers.items() if stats.alignment is not None}

    @property
    def undefined(self) -> list[str]:
        """Layers without an alignment, because the instruction vector (or the complex vector) is zero there."""
        return [name for name, stats in self.layers.items() if stats.alignment is None]

    @property
    def spread(self) -> float:
        """Largest minus smallest alignment; 0 with fewer than two layers."""
        alignments = self.values.values()
        return max(alignments) - min(alignments) if alignments else 0.0

    @property
    def flat(self) -> bool:
        """Whether the alignments spread too little to rank by (see FLAT_SPREAD)."""
        return len(self.values) > 1 and self.spread < FLAT_SPREAD

    @property
    def norm_correlation(self) -> float | None:
        """Spearman's rank correlation between alignment and −relative norm over the layers.

        Returns:
            In [-1, 1]; 1 where layers with a smaller relative norm are always better aligned. None where fewer than two layers have both figures, or one
            of the figures is the same in all layers.
        """
        pairs = [
            (stats.alignment, -stats.relative_norm)
            for stats in self.layers.values()
            if stats.alignment is not None and stats.relative_norm is not None
        ]
        return _correlation(_average_ranks([one for one, _ in pairs]), _average_ranks([other for _, other in pairs]))

    @property
    def by_relative_norm(self) -> bool:
        """Whether ranking by alignment amounts to ranking by relative norm: over four layers or more, the rank correlation reaches ±NORM_CORRELATION."""
        correlation = self.norm_correlation
        return correlation is not None and abs(correlation) >= NORM_CORRELATION and len(self.values) >= _FEWEST_RANKED

    def ranking(self) -> dict[str, float | bool | None]:
        """Return the figures that say whether ranking by these alignments means anything, as plain types for JSON."""
        return dict(zip(RANKING, (self.spread, self.flat, self.norm_correlation, self.by_relative_norm), strict=True))

    def spread_warning(self) -> str:
        """Return one sentence for alignments that are too flat to rank by."""
        return f"The alignments spread by {self.spread:.4f}, less than {FLAT_SPREAD}: too little to rank the layers by."

    def cautions(self) -> list[str]:
        """Return the reasons against ranking the layers, a sentence each; an empty list if there are none."""
        sentences = []
        if self.flat:
            sentences.append(self.spread_warning())
        if self.by_relative_norm:
            sentences.append(
                f"The ranking is one by relative norm: the rank correlation of alignment with −relative norm is {self.norm_correlation:.2f}."
            )
        return sentences

    def plot(self, ax: Axes | None = None) -> tuple[Figure | SubFigure, Axes]:
        """Draw the alignment of every layer, or its norm where no instruction vector is known.

        Args:
            ax: Axes to draw into; by default those of a new figure of pyplot.

        Returns:
            Figure and axes, as the ``plot`` of torchmetrics. Alignments that are too flat to rank by are grey.

        Raises:
            LataError: matplotlib is not installed.
        """
        axes = new_axes() if ax is None else ax
        moved = {name: stats for name, stats in self.layers.items() if stats.moved}
        known = {name: value for name, stats in moved.items() if (value := stats.alignment if self.values else stats.task_norm) is not None}
        positions = [list(self.layers).index(name) for name in known]
        axes.plot(positions, list(known.values()), marker="o", color="0.5" if self.flat else "C0")
        # As many names as fit beside each other.
        shown = range(0, len(self.layers), max(1, -(-len(self.layers) // 20)))
        axes.set_xticks(list(shown), [list(self.layers)[number] for number in shown], rotation=60, ha="right", fontsize="small")
        axes.set_ylabel("alignment" if self.values else "task norm")
        axes.set_xlabel(self.level)
        if self.flat:
            axes.set_title("too flat to rank by", fontsize="small")
        return axes.figure, axes

    def with_coefficients(self, coefficients: Mapping[str, float] | None, outside: float = 0.0) -> Alignment:
        """Return this measurement with coefficients filled in: one for each layer, and one for all tensors outside."""
        layers = {
            name: replace(stats, coefficient=None if coefficients is None else coefficients[name]) for name, stats in self.layers.items()
        }
        rest = {name: replace(stats, coefficient=None if coefficients is None else outside) for name, stats in self.outside.items()}
        return replace(self, layers=layers, outside=rest)

    def to_json(self) -> dict[str, Any]:
        """Return plain types for JSON; an undefined alignment is null."""
        return {
            "level": self.level,
            "start": self.start,
            "layers": {name: asdict(stats) for name, stats in self.layers.items()},
            "outside": {name: asdict(stats) for name, stats in self.outside.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Alignment:
        """Invert ``to_json``."""
        layers, outside = ({name: LayerStats(**stats) for name, stats in data[key].items()} for key in ("layers", "outside"))
        return cls(data["level"], data["start"], layers, outside)


def new_axes() -> Axes:
    """Return the axes of a new figure of pyplot.

    Raises:
        LataError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise LataError("a plot needs matplotlib, which is not installed: pip install 'lata_lightning[report]'") from error
    return pyplot.subplots(layout="constrained")[1]


def _average_ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value in ascending order, from 1; equal values share the mean of their ranks."""
    rising = sorted(values)
    return [(bisect_left(rising, value) + bisect_right(rising, value) + 1) / 2 for value in values]


def _correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return Pearson's correlation; None where a side does not vary."""
    means = sum(one) / max(len(one), 1), sum(other) / max(len(other), 1)
    pairs = [(a - means[0], b - means[1]) for a, b in zip(one, other, strict=True)]
    squares = sum(a * a for a, _ in pairs), sum(b * b for _, b in pairs)
    if not all(squares):
        return None
    return max(-1.0, min(1.0, sum(a * b for a, b in pairs) / math.sqrt(squares[0] * squares[1])))


def alignment_of(table: Mapping[str, Moments], layers: LayerMap, level: Level = "block", start: Start = "instruct") -> Alignment:
    """Compute the alignment of each layer from the moments of each tensor."""
    grouped = {layer: total(table[name] for name in names) for layer, names in layers.layers(level).items()}
    return Alignment(
        level=level,
        start=check_start(start),
        layers={layer: LayerStats.of(moments) for layer, moments in grouped.items()},
        outside={name: LayerStats.of(table[name]) for name in layers.outside()},
    )


def layer_alignment(table: Mapping[str, Moments]) -> dict[str, float]:
    """Return the cosine between complex vector and instruction vector, one value per layer.

    Args:
        table: Moments by layer.

    Returns:
        Dimensionless, in [-1, 1], by layer name; absent where the instruction vector is zero.

    Source: LATA, arXiv:2502.20186, step 2.
    """
    return {layer: moments.alignment for layer, moments in table.items() if moments.alignment is not None}
