"""The manifest of a task vector, ``task_vector.json``: everything about it but its tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

from lata_lightning.alignment import RANKING, Alignment
from lata_lightning.errors import CorruptFileError, SourceError
from lata_lightning.layers import LEVELS, LayerMap, LayerPosition, Level
from lata_lightning.moments import STARTS, Start
from lata_lightning.store.descriptors import unreadable
from lata_lightning.store.directories import MANIFEST_NAME
from lata_lightning.store.meaning import Meaning
from lata_lightning.store.seal import check_seal, sealed
from lata_lightning.vectors.entries import FactorEntry, PrecisionLoss, TensorEntry
from lata_lightning.vectors.provenance import UNKNOWN, Derivation, Identity
from lata_lightning.weighting import DEFAULT_THRESHOLD, ORIGINS, is_own_name

Kind = Literal["task", "instruction"]
FORMAT = "lata_lightning.task_vector"
FORMAT_VERSION = 3
"""Version 2 stores tensors as factors, version 3 has a hash of the manifest and what the tensors mean; older versions are read as well."""
_FIRST_SEALED = 3


@dataclass(frozen=True)
class Manifest:
    """Everything about a task vector but its tensors.

    Attributes:
        kind: ``task`` (tuned − start) or ``instruction`` (instruct − base).
        start: What the fine-tune started from.
        start_identity, tuned_identity: The two sides of the difference.
        layers: Block and part of every tensor.
        level: Unit of the coefficients.
        outside: Coefficient of the tensors that belong to no layer.
        weighting: Name of the rule that made the coefficients, or of another origin of theirs.
        threshold: Parameter of the rule ``threshold``.
        coefficients: By layer; None as long as no rule has been applied.
        alignment: The measured alignment, from which a rule makes coefficients.
        instruction_identity: Base and instruct model of the instruction vector that the alignment was measured with.
        meaning: What config and tokenizers say about the tensors, as far as known.
        tied: Groups of names that are one tensor in the model.
        step, epoch: When it was taken, in optimizer steps and finished epochs; None for vectors extracted from files.
        precision_loss: Measured cost of a stored precision below float32.
        tensors: Shape, dtype and hash by name; empty until the vector is saved.
        derivation: How it was made, if it was made from other vectors.
        asked_for: Whether the coefficients were set by this process, and not read from a file. Those of a file are not applied where their alignments
            are flat (see ``lata_lightning.merging.weigh``). Never stored.
        leave_out: Regular expressions that match the names of the tensors that were left out.
    """

    kind: Kind
    start: Start
    layers: LayerMap
    start_identity: Identity = UNKNOWN
    tuned_identity: Identity = UNKNOWN
    level: Level = "block"
    outside: float = 0.0
    weighting: str = "none"
    threshold: float = DEFAULT_THRESHOLD
    coefficients: Mapping[str, float] | None = None
    alignment: Alignment | None = None
    instruction_identity: tuple[Identity, Identity] | None = None
    meaning: Meaning = field(default_factory=Meaning)
    tied: tuple[tuple[str, ...], ...] = ()
    step: int | None = None
    epoch: int | None = None
    precision_loss: PrecisionLoss | None = None
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    derivation: Derivation | None = None
    asked_for: bool = field(default=True, compare=False)
    leave_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as plain types for JSON."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "start": {"kind": self.start, **asdict(self.start_identity)},
            "tuned": asdict(self.tuned_identity),
            "instruction_vector": None
            if self.instruction_identity is None
            else {"base": asdict(self.instruction_identity[0]), "instruct": asdict(self.instruction_identity[1])},
            "model": self.meaning.to_json(),
            "step": self.step,
            "epoch": self.epoch,
            "level": self.level,
            "outside": self.outside,
            "weighting": {
                "rule": self.weighting,
                "threshold": self.threshold if self.weighting == "threshold" else None,
                **({} if self.weighting in ORIGINS else {"custom": True}),
            },
            "coefficients": None if self.coefficients is None else dict(self.coefficients),
            "alignment": None if self.alignment is None else self.alignment.to_json(),
            **(dict.fromkeys(RANKING) if self.alignment is None else self.alignment.ranking()),
            "precision_loss": None if self.precision_loss is None else asdict(self.precision_loss),
            **({} if self.derivation is None else {"derivation": asdict(self.derivation)}),
            **({"leave_out": list(self.leave_out)} if self.leave_out else {}),
            "blocks": list(self.layers.blocks),
            "tied": [list(group) for group in self.tied],
            "tensors": {
                name: {
                    **asdict(entry),
                    "shape": list(entry.shape),
                    "block": self.layers.positions[name].block,
                    "part": self.layers.positions[name].part,
                }
                for name, entry in self.tensors.items()
            },
            "versions": library_versions(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Read what ``to_json`` wrote; library versions are informative only."""
        entries = data["tensors"]
        positions = {name: LayerPosition(entry["block"], entry["part"]) for name, entry in entries.items()}
        instruction = data["instruction_vector"]
        rule = data["weighting"]
        coefficients = data["coefficients"]
        layers = LayerMap(positions, tuple(data["blocks"]))
        for word, choices in (
            (data["kind"], get_args(Kind)),
            (data["start"]["kind"], STARTS),
            (data["level"], LEVELS),
        ):
            if word not in choices:
                raise ValueError(f"{word!r} is none of {choices}")
        if rule["rule"] not in ORIGINS and not (rule.get("custom") is True and is_own_name(rule["rule"])):
            raise ValueError(f"{rule['rule']!r} is none of {ORIGINS}, and no rule of one's own")
        known = set(layers.layers(data["level"]))
        if coefficients is not None:
            numbers = [*coefficients.values(), data["outside"]]
            if set(coefficients) != known or not all(math.isfinite(number) for number in numbers):
                raise ValueError("coefficients that are not one finite number for each layer")
        return cls(
            kind=data["kind"],
            start=data["start"]["kind"],
            start_identity=Identity(**{key: value for key, value in data["start"].items() if key != "kind"}),
            tuned_identity=Identity(**data["tuned"]),
            layers=layers,
            level=data["level"],
            outside=data["outside"],
            weighting=rule["rule"],
            threshold=DEFAULT_THRESHOLD if rule["threshold"] is None else rule["threshold"],
            coefficients=coefficients,
            alignment=None if data["alignment"] is None else Alignment.from_json(data["alignment"]),
            instruction_identity=None if instruction is None else (Identity(**instruction["base"]), Identity(**instruction["instruct"])),
            meaning=Meaning.from_json(data["model"]) if "model" in data else Meaning(),
            tied=tuple(tuple(group) for group in data["tied"]),
            step=data["step"],
            epoch=data["epoch"],
            precision_loss=None if data["precision_loss"] is None else PrecisionLoss(**data["precision_loss"]),
            tensors={
                name: TensorEntry(
                    tuple(entry["shape"]),
                    entry["dtype"],
                    entry["hash"],
                    entry["unchanged"],
                    None if entry.get("factors") is None else tuple(FactorEntry(**part) for part in entry["factors"]),
                )
                for name, entry in entries.items()
            },
            derivation=Derivation.from_json(data["derivation"]) if "derivation" in data else Derivation.from_older(data),
            leave_out=_texts(data.get("leave_out", [])),
            asked_for=False,
        )


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"{value!r} is no list of texts")
    return tuple(value)


def read_manifest(directory: Path, *, sealed_only: bool = False) -> Manifest:
    """Return the manifest of a saved task vector.

    Args:
        directory: Directory of the vector.
        sealed_only: Whether to compare the manifest with its own hash. Manifests of versions 1 and 2 have none.

    Raises:
        SourceError: There is none, or it is of a newer format.
        CorruptFileError: The manifest cannot be understood, or was edited.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise SourceError(
            f"{directory} is no task vector: it holds no {MANIFEST_NAME}. Make one with: lata extract START TUNED --output {directory}"
        )
    try:
        text = path.read_text("utf-8")
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise SourceError(f"{path} is of format {data['format']!r}, expected {FORMAT!r}")
        if data["format_version"] > FORMAT_VERSION:
            raise SourceError(
                f"{path} is of format version {data['format_version']}, this lata_lightning reads up to {FORMAT_VERSION}. Upgrade it."
            )
        if sealed_only and data["format_version"] >= _FIRST_SEALED:
            check_seal(text, path)
        return Manifest.from_json(data)
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError(f"{path} is no valid task vector manifest ({error!r})") from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest of a task vector, with its own hash."""
    (directory / MANIFEST_NAME).write_text(sealed(manifest.to_json()), "utf-8")


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that shape the numbers, without importing them."""
    versions = {}
    for name in ("lata_lightning", "lightning", "peft", "torch", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
