"""Every row of the comparison: from the experts of a setting to one vector, which is added with a scale.

Names are those of the small models' comparison. Nothing of the size of the model is in memory, but where samples are run: a tensor of a row is
computed when it is read. TIES and DARE are by peft, tensor by tensor, as peft and mergekit take them.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils import merge_utils
from torch import Tensor
from typing_extensions import override

from lata_lightning.alignment import Alignment, LayerStats
from lata_lightning.errors import LataError
from lata_lightning.linearity.from_vectors import merge_matrices
from lata_lightning.linearity.methods import MatrixMethod
from lata_lightning.linearity.regression import regress
from lata_lightning.linearity.solving import solve_coefficients
from lata_lightning.store.sources import Origin, TensorSource
from lata_lightning.store.views import Computed
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.provenance import Derivation, Identity, Input
from lata_lightning.vectors.task_vector import TaskVector
from study.cells import ANCHORED, TASK_ARITHMETIC
from study.real.configuration import Protocol
from study.real.published.streamed import STREAMED, Measured

RANDOM_ROWS = 3
RULED = tuple(f"LATA {rule}, block" for rule in ("linear", "log", "threshold"))
UNRANKED = ("blocks only", *(f"random linear {number}" for number in range(1, RANDOM_ROWS + 1)))
OTHERWISE_RANKED = ("by relative norm, linear", "reversed linear")
Kind = Literal["method", "control", "candidate"]
Samples = Sequence[Sequence[Mapping[str, Tensor]]]


class Combined(Computed):
    """Several sources with the same tensors, of which each tensor is made into one when it is read.

    Args:
        sources: At least one.
        combine: Takes the tensor of every source, in float32 and in their order, and its name.
    """

    def __init__(self, sources: Sequence[TensorSource], combine: Callable[[list[Tensor], str], Tensor]) -> None:
        super().__init__(sources[0], Origin(f"{len(sources)} vectors combined"), dtype=torch.float32)
        self._sources, self._combine = sources, combine

    @override
    def read(self, name: str) -> Tensor:
        return self._combine([source.read(name).float() for source in self._sources], name)


def combined(name: str, vectors: Sequence[TaskVector], combine: Callable[[list[Tensor], str], Tensor]) -> TaskVector:
    """Return one vector out of several of one start, tensor by tensor."""
    derivation = Derivation(name, {}, tuple(Input(vector.label, vector.manifest.tuned_identity) for vector in vectors))
    manifest = replace(vectors[0].unweighted().manifest, tuned_identity=Identity(), alignment=None, derivation=derivation, tensors={})
    return TaskVector(Combined([vector.tensors for vector in vectors], combine), manifest)


def summed(vectors: Sequence[TaskVector]) -> TaskVector:
    """Return the sum of vectors, in float64 and rounded once."""
    return combined("sum", vectors, lambda tensors, _: torch.stack(tensors).sum(0, dtype=torch.float64).float())


def largest(vectors: Sequence[TaskVector]) -> TaskVector:
    """Return entry by entry the value of the largest magnitude, of equal ones the first; MagMax, arXiv:2407.06322."""

    def chosen(tensors: list[Tensor], name: str) -> Tensor:
        stacked = torch.stack(tensors)
        return stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]

    return combined("magmax", vectors, chosen)


@dataclass(frozen=True)
class Merge:
    """The experts of one merge, and what methods may look at.

    Attributes:
        protocol: What the experts were tuned from.
        seed: Of everything random.
        start: Directory that the experts were tuned from.
        instruct: Directory of the instruct model; the start under the protocol ``plain``.
        vectors: Expert − start.
        instruction: Instruct − base; None under ``plain``.
        samples: Of each expert some training rows as inputs of the model.
        score: Validation score of scaled and weighted vectors on ``instruct``, higher is better; only the few-shot search uses it.
        trials: Models that this search scores.
    """

    protocol: Protocol
    seed: int
    start: Path
    instruct: Path
    vectors: Sequence[TaskVector]
    instruction: TaskVector | None
    samples: Callable[[], Samples]
    score: Callable[[Sequence[TaskVector]], float]
    trials: int

    @cached_property
    def anchored(self) -> list[TaskVector]:
        """Expert − instruct."""
        if self.instruction is None or self.protocol != "base":
            return list(self.vectors)
        return [vector.without(self.instruction) for vector in self.vectors]

    @cached_property
    def alignments(self) -> list[Alignment]:
        """Of every expert with the instruction vector, by block; none without an instruction vector."""
        return [] if self.instruction is None else [align(vector, self.instruction, check_base=False) for vector in self.vectors]

    @property
    def layers(self) -> list[str]:
        """Names of the blocks."""
        return list(self.vectors[0].layers.layers())


@dataclass(frozen=True)
class Row:
    """One row: onto + scale · build(merge).

    Attributes:
        name: In results and tables.
        kind: Published method, control, or candidate of this project.
        onto: What is added to: the start of the experts, or instruct.
        build: The vector at scale 1, computed when it is read.
        protocols: Where it is a row of its own.
        tuned: Whether it looks at validation scores beyond the choice of the scale.
    """

    name: str
    kind: Kind
    onto: Literal["start", "instruct"]
    build: Callable[[Merge], TaskVector]
    protocols: tuple[Protocol, ...] = ("plain", "instruct", "base")
    tuned: bool = False

    def model(self, merge: Merge) -> Path:
        """Return the directory of what is added to."""
        return merge.start if self.onto == "start" else merge.instruct


def rows_for(protocol: Protocol) -> dict[str, Row]:
    """Return the rows of a protocol by name; without an instruction vector there are no alignments to rank by."""
    return {row.name: row for row in ROWS if protocol in row.protocols}


# Published methods.


def task_arithmetic(merge: Merge) -> TaskVector:
    """Σ (expert − start); arXiv:2212.04089."""
    return summed(merge.vectors)


def ties(merge: Merge, density: float) -> TaskVector:
    """TIES; arXiv:2306.01708."""
    return _by_peft(merge, "ties", partial(merge_utils.ties, density=density))


def dare(merge: Merge, density: float) -> TaskVector:
    """DARE: entries kept at random and enlarged, then added; arXiv:2311.03099."""
    return _by_peft(merge, "dare", partial(merge_utils.dare_linear, density=density))


def by_matrix(merge: Merge, method: MatrixMethod, anchored: bool = False) -> TaskVector:
    """One vector made of the vectors alone, matrix by matrix, by the package."""
    return merge_matrices(merge.anchored if anchored else merge.vectors, method, check_base=False)


def weighted(merge: Merge, name: str) -> TaskVector:
    """Σ of vectors that count from instruct, with coefficients by block: the rules of LATA (arXiv:2502.20186) and their controls."""
    weight = STREAMED[name].weight
    if weight is None:
        raise LataError(f"the row {name!r} has no coefficients")
    # Without an instruction vector there are layers, and nothing to rank them by.
    nothing = Alignment("block", "instruct", dict.fromkeys(merge.layers, LayerStats(None, None, 0.0, 0.0)), {})
    alignments = [replace(alignment, start="instruct") for alignment in merge.alignments] or [nothing] * len(merge.vectors)
    pairs = zip(merge.anchored, alignments, strict=True)
    return summed([weight(Measured(vector, alignment, number, merge.seed)).pure() for number, (vector, alignment) in enumerate(pairs)])


def solved(merge: Merge) -> TaskVector:
    """Coefficients in closed form by block, from samples; arXiv:2504.10902."""
    found = solve_coefficients(str(merge.instruct), merge.anchored, merge.samples(), check_base=False)
    return summed([vector.pure() for vector in found.apply(merge.anchored, check_base=False)])


# Controls.


def anchored(merge: Merge) -> TaskVector:
    """Σ (expert − instruct)."""
    return summed(merge.anchored)


# Candidates.


def regressed(merge: Merge) -> TaskVector:
    """Every linear layer fitted to the outputs of all experts on their own samples, by the package."""
    return regress(merge.anchored, str(merge.instruct), merge.samples(), check_base=False)


def few_shot(merge: Merge) -> TaskVector:
    """Coefficients by block and expert that are searched by validation score: a (1 + 1) evolution strategy that begins at equal ones."""
    draw = random.Random(f"{merge.seed}/few-shot")
    first = [dict.fromkeys((*merge.layers, ""), scale) for scale in (0.3, 0.5, 1.0)]

    def weighted(tables: Sequence[Mapping[str, float]]) -> list[TaskVector]:
        return [
            vector.with_coefficients({layer: table[layer] for layer in merge.layers}, outside=table[""])
            for vector, table in zip(merge.anchored, tables, strict=True)
        ]

    equal = [[table] * len(merge.vectors) for table in first]
    scores = [merge.score(weighted(tables)) for tables in equal]
    best, step = max(scores), 0.3
    current: list[dict[str, float]] = equal[scores.index(best)]
    for _ in range(merge.trials - len(scores)):
        trial = [{layer: number * draw.lognormvariate(0, step) for layer, number in table.items()} for table in current]
        score = merge.score(weighted(trial))
        if score > best:
            current, best, step = trial, score, step * 1.5
        else:
            step *= 0.9
    return summed([vector.pure() for vector in weighted(current)])


def _by_peft(merge: Merge, name: str, method: Callable[[list[Tensor], Tensor], Tensor]) -> TaskVector:
    def combine(tensors: list[Tensor], tensor_name: str) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{merge.seed}/{tensor_name}".encode()))
            merged: Tensor = method(tensors, torch.ones(len(tensors)))
        return merged

    return combined(name, merge.vectors, combine)


def _listed() -> list[Row]:
    with_instruction: Any = ("instruct", "base")
    method, control, candidate = (partial(Row, kind=kind) for kind in ("method", "control", "candidate"))
    return [
        method(TASK_ARITHMETIC, onto="start", build=task_arithmetic),
        method("TIES 0.2", onto="start", build=partial(ties, density=0.2)),
        method("DARE 0.5", onto="start", build=partial(dare, density=0.5)),
        method("TSV-M", onto="start", build=partial(by_matrix, method="tsv")),
        method("Iso-C", onto="start", build=partial(by_matrix, method="iso")),
        *(method(name, onto="instruct", build=partial(weighted, name=name), protocols=with_instruction) for name in RULED),
        method("closed form, block", onto="instruct", build=solved),
        control(ANCHORED, onto="instruct", build=anchored, protocols=("base",)),
        *(control(name, onto="instruct", build=partial(weighted, name=name)) for name in UNRANKED),
        *(control(name, onto="instruct", build=partial(weighted, name=name), protocols=with_instruction) for name in OTHERWISE_RANKED),
        candidate("lata regress without samples", onto="start", build=partial(by_matrix, method="regression")),
        candidate(
            "lata regress without samples, anchored",
            onto="instruct",
            build=partial(by_matrix, method="regression", anchored=True),
            protocols=("base",),
        ),
        candidate("lata regress", onto="instruct", build=regressed),
        candidate("few-shot from uniform", onto="instruct", build=few_shot, tuned=True),
    ]


ROWS = _listed()
