"""Whether LATA gains where layers differ more: depth, width and the length of the fine-tuning against the spread of the alignments.

The pair of texts, with few methods: a gain in loss is there after few steps and a skill is not, and of two texts task arithmetic keeps what tells methods
apart in models of every size. Those of other sizes than the benchmark's own are trained for fewer steps, as many for every depth and width, so that a seed
takes minutes even where a step costs three times as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from scipy.stats import spearmanr
from torch import Tensor

from lata_lightning.errors import LataError
from study import merging
from study.chain import Chain, Start
from study.rules import ANCHORED, METHODS, RANDOM_ROWS, TASK_ARITHMETIC, WITHOUT_SAMPLES
from study.settings import PAIR_OF, Setting
from study.tasks import data_folder
from study.training import Shape

PROTOCOLS: tuple[Start, ...] = ("instruct", "base")
SCALES = (0.0, 0.2, 0.3, 0.45, 0.65, 1.0, 1.4, 2.0)
LATA = ("LATA linear, block", "LATA log, block", "LATA linear, outside 1")
BLOCKS_ONLY = "blocks only"
AT_ONE = f"{WITHOUT_SAMPLES}, at scale 1"
"""In the scores: the merge without samples with no scale chosen."""
RANDOM = tuple(f"random linear {number}" for number in range(1, RANDOM_ROWS + 1))


class Variant(NamedTuple):
    """A size, and how many times as long as usual the experts are tuned; ``protocols`` are those that are run with it."""

    shape: Shape
    length: float = 1.0
    protocols: tuple[Start, ...] = PROTOCOLS

    @property
    def name(self) -> str:
        """In results."""
        size = f"{self.shape.blocks} blocks of width {self.shape.width}"
        return size if self.length == 1 else f"{size}, tuned {self.length:g} times as long"


def _short(blocks: int, width: int) -> Shape:
    return Shape(blocks, width, base_steps=200, instruct_steps=700, tuning=0.5)


VARIANTS = (
    Variant(Shape()),
    Variant(Shape(), 3.0, ("instruct",)),
    *(Variant(_short(blocks, 48)) for blocks in (8, 16, 24)),
    Variant(_short(8, 96)),
)


class LongerChain(Chain):
    """The models of a seed whose experts are tuned for longer.

    Args:
        length: Of their fine-tunes, as a multiple of the usual one.
        given: As for ``Chain``.
    """

    def __init__(self, length: float, *given: Any) -> None:
        super().__init__(*given)
        self._length = length

    def expert(self, task: str, start: Start, length: float = 1.0) -> dict[str, Tensor]:
        """As in ``Chain``, for that many times as many steps."""
        return super().expert(task, start, length * self._length)


def run(work: Path, seed: int, variants: Sequence[Variant] = VARIANTS, data: Path | None = None) -> dict[str, Any]:
    """Every variant of one seed.

    Args:
        work: Folder of the models, as for ``Chain``; what it lacks is trained.
        seed: Of the models.
        variants: Sizes and lengths.
        data: Folder with real text; that of the environment unless given.

    Returns:
        For JSON: ``rows``, one for each variant and protocol, with the spread of the alignments (mean over the experts, at block level as ``spread``, at
        every level as ``spreads``), the mean Spearman correlation of alignment and −ρ over blocks, and the ``scores`` on test of task arithmetic, of it
        in the blocks only, of LATA and the mean of random ranks, with the whole curves under ``methods``; ``left_out``, by name why there is no such
        row; and processor time.
    """
    rows, left_out = [], {}
    trained: dict[tuple[str, str], float] = {}
    for variant in variants:
        chain = LongerChain(variant.length, work, seed, variant.shape, data or data_folder())
        for protocol in variant.protocols:
            try:
                rows.append(measured(chain, variant, protocol))
            except LataError as error:
                # A model of another size may learn too little in the steps it gets; the others stand.
                left_out[row_name(variant, protocol)] = str(error)
        # Variants of one shape share models.
        trained |= {(str(variant.shape), key): seconds for key, seconds in chain.seconds.items()}
    minutes = {"training": sum(trained.values()) / 60, "evaluation": sum(row["cpu_minutes"] for row in rows)}
    return {"part": "heterogeneity", "seed": seed, "rows": rows, "left_out": left_out, "cpu_minutes": minutes}


def row_name(variant: Variant, protocol: Start) -> str:
    """Name of a row."""
    return f"{variant.name}, from {protocol}"


def measured(chain: Chain, variant: Variant, protocol: Start) -> dict[str, Any]:
    """One variant under one protocol, for JSON."""
    names = (TASK_ARITHMETIC, *([ANCHORED] if protocol == "base" else []), BLOCKS_ONLY, *LATA, WITHOUT_SAMPLES, *RANDOM)
    setting = Setting("text", protocol, PAIR_OF["text"])
    found = merging.run(chain, setting, SCALES, {name: METHODS[name] for name in names})
    tests = {name: row["test"] for name, row in found["methods"].items()}
    tests[AT_ONE] = found["methods"][WITHOUT_SAMPLES]["untuned"]
    spreads = {level: fmean(values) for level, values in found["spread"].items()}
    return {
        "name": row_name(variant, protocol),
        "shape": {
            "blocks": variant.shape.blocks,
            "width": variant.shape.width,
            "base_steps": variant.shape.base_steps,
            "instruct_steps": variant.shape.instruct_steps,
            "tuning": variant.shape.tuning,
        },
        "length": variant.length,
        "protocol": protocol,
        "spread": spreads["block"],
        "spreads": spreads,
        "rank_correlation": rank_correlation(found["alignment"], found["relative_norm"]),
        "relative_norm": fmean(value for values in found["relative_norm"].values() for value in values),
        "headroom": found["headroom"],
        "scores": {name: score for name, score in tests.items() if name not in RANDOM} | {"random": fmean(tests[name] for name in RANDOM)},
        "reference": found["reference"],
        "methods": found["methods"],
        "cpu_minutes": found["cpu_minutes"]["evaluation"],
    }


def rank_correlation(alignment: dict[str, list[float]], relative_norm: dict[str, list[float]]) -> float:
    """Spearman correlation over the layers of alignment and minus relative norm, mean over the experts.

    Args:
        alignment: By layer, a value for each expert.
        relative_norm: The same of ‖task vector‖ / ‖instruction vector‖.
    """
    pairs = zip(zip(*alignment.values(), strict=True), zip(*relative_norm.values(), strict=True), strict=True)
    return fmean(float(spearmanr(values, [-norm for norm in norms]).statistic) for values, norms in pairs)
