"""Coefficients in closed form, in memory and as a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lata_lightning.errors import BaseMismatchError, CorruptFileError, LataError, OutputError, SourceError
from lata_lightning.layers import Level, check_level
from lata_lightning.store.names import differing_prefixes
from lata_lightning.store.writer import check_free, write_json
from lata_lightning.vectors.manifest import library_versions
from lata_lightning.vectors.provenance import Identity
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import CLOSED_FORM

FORMAT = "lata_lightning.coefficients"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class SolvedVector:
    """The coefficients of one task vector.

    Attributes:
        label: Path of the vector, or its two sides.
        tuned: Identity of the tuned model.
        samples: Number of rows of its task that were run.
        coefficients: Coefficient of each layer, named as in the first vector; all vectors have the same layers.
    """

    label: str
    tuned: Identity
    samples: int
    coefficients: Mapping[str, float]


@dataclass(frozen=True)
class LayerFit:
    """Quality of the solution of one layer; both figures are None where no vector changes its output.

    Attributes:
        condition: Condition number of the solved matrix, including the ridge.
        residual: Remaining share of Σ_t E‖Δ_t‖², in [0, 1]: 0 where the change of every task is reproduced exactly.
    """

    condition: float | None
    residual: float | None


@dataclass(frozen=True)
class Solution:
    """Coefficients for merging several task vectors.

    Attributes:
        level: Unit of weighting: ``block`` or ``submodule``.
        outside: Coefficient of the tensors outside all layers, and of layers without a solution (norms, at level ``submodule``).
        ridge: The ridge as given, relative to the mean of the diagonal.
        start: Identity of the model that was run.
        vectors: The vectors in the given order.
        fits: Quality of each solved layer.
    """

    level: Level
    outside: float
    ridge: float
    start: Identity
    vectors: tuple[SolvedVector, ...]
    fits: Mapping[str, LayerFit]

    def apply(self, vectors: Sequence[TaskVector], *, check_base: bool = True) -> list[TaskVector]:
        """Return vectors with these coefficients.

        Args:
            vectors: The vectors in the order in which they were solved for.
            check_base: Refuse a vector that is known to differ from the one at its position.

        Raises:
            LataError: The number of vectors or their layers differ.
            BaseMismatchError: A vector is known to differ from the one at its position.
        """
        if len(vectors) != len(self.vectors):
            raise LataError(
                f"the coefficients belong together and are for {len(self.vectors)} vectors, got {len(vectors)}; solved for were "
                f"{', '.join(solved.label for solved in self.vectors)}"
            )
        for vector, solved in zip(vectors, self.vectors, strict=True):
            if check_base and self._known_to_differ(vector.manifest.tuned_identity, solved.tuned):
                raise BaseMismatchError(
                    f"the coefficients in the place of {vector.label} are for {solved.label}, which is another vector. Give the vectors in the order "
                    "in which they were solved for, or switch the check off (check_base=False, --check-base false)."
                )
        return [
            vector.with_coefficients(self._own(vector, solved.coefficients), level=self.level, outside=self.outside, weighting=CLOSED_FORM)
            for vector, solved in zip(vectors, self.vectors, strict=True)
        ]

    def _own(self, vector: TaskVector, coefficients: Mapping[str, float]) -> dict[str, float]:
        """Coefficients under the names that a vector has for its layers, which may have a prefix that the first vector lacks, or the other way round."""
        own = vector.layers.layers(self.level)
        extra, missing = differing_prefixes(own, coefficients, vector.label)
        renamed = {extra + layer.removeprefix(missing): number for layer, number in coefficients.items()}
        # What was left out of a vector may be a whole layer.
        return {layer: number for layer, number in renamed.items() if layer in own} if vector.manifest.leave_out else renamed

    def _known_to_differ(self, given: Identity, solved: Identity) -> bool:
        if given.content_hash and solved.content_hash:
            return given.content_hash != solved.content_hash
        # Paths change, so a different path means little; but the path of another vector of this solution shows that the order is wrong.
        return given.location != solved.location and given.location in {other.tuned.location for other in self.vectors} - {None}

    def save(self, path: str | Path) -> None:
        """Write the file for ``lata merge --coefficients``.

        Raises:
            OutputError: The path exists, or cannot be written.
        """
        target = Path(path)
        check_free(target)
        partial = target.with_name(f".{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_json(partial, self.to_json())
            partial.rename(target)
        except OSError as error:
            raise OutputError(f"{target} cannot be written: {error.strerror or error}") from error

    @classmethod
    def open(cls, path: str | Path) -> Solution:
        """Read a file of coefficients.

        Raises:
            SourceError: The file does not exist, or has a newer format.
            CorruptFileError: The file holds no coefficients.
        """
        try:
            data = json.loads(Path(path).read_text("utf-8"))
            if data["format_version"] > FORMAT_VERSION:
                raise SourceError(
                    f"{path} is of format version {data['format_version']}, this lata_lightning reads up to {FORMAT_VERSION}. Upgrade it."
                )
            return cls.from_json(data)
        except OSError as error:
            raise SourceError(
                f"{path} cannot be read ({error.strerror}). Make it with: lata solve START VECTOR... --data FILE... --output {path}"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, LataError) as error:
            if isinstance(error, SourceError):
                raise
            raise CorruptFileError(f"{path} is no file of coefficients ({error!r})") from error

    def to_json(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "rule": CLOSED_FORM,
            "level": self.level,
            "outside": self.outside,
            "ridge": self.ridge,
            "start": asdict(self.start),
            "vectors": [{**asdict(solved), "coefficients": dict(solved.coefficients)} for solved in self.vectors],
            "layers": {layer: asdict(fit) for layer, fit in self.fits.items()},
            "versions": library_versions(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Solution:
        """Invert ``to_json``; library versions are ignored."""
        if (data["format"], data["rule"]) != (FORMAT, CLOSED_FORM):
            raise ValueError(f"format {data['format']!r} with the rule {data['rule']!r}")
        vectors = tuple(
            SolvedVector(
                entry["label"],
                Identity(**entry["tuned"]),
                entry["samples"],
                {layer: float(number) for layer, number in entry["coefficients"].items()},
            )
            for entry in data["vectors"]
        )
        numbers = [float(data["outside"]), *(number for solved in vectors for number in solved.coefficients.values())]
        if not vectors or not all(math.isfinite(number) for number in numbers):
            raise ValueError("coefficients that are not finite numbers")
        if any(set(solved.coefficients) != set(vectors[0].coefficients) for solved in vectors):
            raise ValueError("vectors with different layers")
        return cls(
            level=check_level(data["level"]),
            outside=float(data["outside"]),
            ridge=float(data["ridge"]),
            start=Identity(**data["start"]),
            vectors=vectors,
            fits={layer: LayerFit(fit["condition"], fit["residual"]) for layer, fit in data["layers"].items()},
        )
