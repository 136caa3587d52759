"""Coefficients in closed form, as a value and as a JSON file."""

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
    """What was found for one task vector.

    Attributes:
        label: Its path, or the two sides it lies between.
        tuned: The tuned side.
        samples: Rows of its task that were run.
        coefficients: By layer, in the names of the first vector; the same layers for all vectors.
    """

    label: str
    tuned: Identity
    samples: int
    coefficients: Mapping[str, float]


@dataclass(frozen=True)
class Fit:
    """How well one layer was determined; both None where no vector moves its output.

    Attributes:
        condition: Condition number of the matrix that was solved, ridge included.
        residual: What is left of Σ_t E‖Δ_t‖², in [0, 1]: 0 where every task's change is kept whole.
    """

    condition: float | None
    residual: float | None


@dataclass(frozen=True)
class Solution:
    """Coefficients for several task vectors that are to be merged.

    Attributes:
        level: Unit of the coefficients: ``block`` or ``submodule``.
        outside: Coefficient of tensors that belong to no layer, and of layers that are not solved for (norms, at level ``submodule``).
        ridge: As it was given, relative to the mean of the diagonal.
        start: The model that was run.
        vectors: In the order in which they were given.
        fits: By solved layer.
    """

    level: Level
    outside: float
    ridge: float
    start: Identity
    vectors: tuple[SolvedVector, ...]
    fits: Mapping[str, Fit]

    def apply(self, vectors: Sequence[TaskVector], *, check_base: bool = True) -> list[TaskVector]:
        """The vectors with these coefficients, in the order in which they were solved for.

        Args:
            vectors: As many as were solved for.
            check_base: Refuse one that is known to be another vector than that in its place.

        Raises:
            LataError: There are more or fewer, or their layers are others.
            BaseMismatchError: One is known to be another vector.
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
        found = {extra + layer.removeprefix(missing): number for layer, number in coefficients.items()}
        # What was left out of a vector may be a whole layer.
        return {layer: number for layer, number in found.items() if layer in own} if vector.manifest.leave_out else found

    def _known_to_differ(self, given: Identity, solved: Identity) -> bool:
        if given.content_hash and solved.content_hash:
            return given.content_hash != solved.content_hash
        # Paths change and say little, but one that belongs in another place says that the order is wrong.
        return given.location != solved.location and given.location in {other.tuned.location for other in self.vectors} - {None}

    def save(self, path: str | Path) -> None:
        """Write the file that ``lata merge --coefficients`` takes.

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
        """The content of such a file.

        Raises:
            SourceError: It does not exist, or is of a newer format.
            CorruptFileError: It is no such file.
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
        """Plain types for JSON."""
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
        """The inverse of ``to_json``; library versions are informative only."""
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
            fits={layer: Fit(fit["condition"], fit["residual"]) for layer, fit in data["layers"].items()},
        )
