"""What stands beside the tensors of a task vector: ``task_vector.json``."""

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
from lata_lightning.weighting import DEFAULT_THRESHOLD, ORIGINS, is_own_name

Kind = Literal["task", "instruction"]
FORMAT = "lata_lightning.task_vector"
FORMAT_VERSION = 3
"""Version 2 has tensors that are stored as factors, version 3 a hash of the manifest and what the tensors mean; older ones are read as well."""
_FIRST_SEALED = 3
OUTSIDE = "outside the layers"
"""Stands for the tensors that belong to no layer, where a derivation gives numbers by layer."""
PROJECTED = "times the instruction vector"
"""What a projection measures: the multiple of the instruction vector that was taken off a layer."""


@dataclass(frozen=True)
class Identity:
    """Which weights a vector was made from.

    Attributes:
        location: Path or hub id as it was given; None for weights in memory.
        revision: Commit of the hub repository.
        content_hash: Hash of names and values, the same for every precision and sharding that holds the same values.
    """

    location: str | None = None
    revision: str | None = None
    content_hash: str | None = None


@dataclass(frozen=True)
class Input:
    """One of the vectors that another vector was made of.

    Attributes:
        label: Its path, or the two sides it lies between.
        tuned: Its tuned side.
        facts: What else is known of its part, such as the number of samples and where they come from.
    """

    label: str
    tuned: Identity = Identity()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """One thing that was measured, layer by layer, when a vector was made of others.

    Attributes:
        name: What it is.
        layers: Its values by layer, None where it has none; ``OUTSIDE`` stands for all tensors together that belong to no layer.
        vector: Label of the vector that it says something about; None if that is the result.
    """

    name: str
    layers: Mapping[str, float | None]
    vector: str | None = None

    @property
    def title(self) -> str:
        """Heading of a column of its values."""
        return self.name if self.vector is None else f"{self.name}, {self.vector}"


@dataclass(frozen=True)
class Derivation:
    """How a vector was made of others.

    Attributes:
        name: The method, such as ``regression`` or ``projection``.
        settings: Its options by name, as plain types.
        inputs: The vectors, in the order in which they were given.
        averaged: Tensors of two axes or more that are the plain mean of the vectors.
        measured: What was measured by layer when it was made.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Input, ...] = ()
    averaged: tuple[str, ...] = ()
    measured: tuple[Measured, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Derivation:
        """The inverse of ``dataclasses.asdict``."""
        measured = tuple(Measured(**entry) for entry in data["measured"])
        inputs = tuple(Input(**{**entry, "tuned": Identity(**entry["tuned"])}) for entry in data["inputs"])
        return cls(**{**data, "inputs": inputs, "averaged": tuple(data["averaged"]), "measured": measured})

    @classmethod
    def from_older(cls, data: Mapping[str, Any]) -> Derivation | None:
        """What a manifest says that was written before all derivations had one form; None if the vector is no derived one."""
        if "regression" in data:
            made = data["regression"]
            inputs = tuple(
                Input(entry["label"], Identity(**entry["tuned"]), {"samples": entry["samples"], "data": entry["data"]})
                for entry in made["vectors"]
            )
            settings = {key: made[key] for key in ("in_order", "off_diagonal", "ridge")}
            return cls("regression", settings, inputs, tuple(made["averaged"]))
        if "projection" in data:
            made = data["projection"]
            measured = Measured(PROJECTED, {**made["shares"], OUTSIDE: made["outside"]})
            return cls("projection", {"level": made["level"]}, measured=(measured,))
        return None


@dataclass(frozen=True)
class Manifest:
    """Everything about a task vector but its tensors.

    Attributes:
        kind: ``task`` (tuned − start) or ``instruction`` (instruct − base).
        start: What the fine-tune started from.
        start_identity, tuned_identity: The two sides of the difference.
        layers: LayerPosition of every tensor.
        level: Unit of the coefficients.
        outside: Coefficient of the tensors that belong to no layer.
        weighting, threshold: Name of the rule behind the coefficients, or of what else they come from, and its parameter.
        coefficients: By layer; None as long as no rule has been applied.
        alignment: What was measured, of which a rule makes coefficients.
        instruction_identity: Hash of the instruction vector that was measured against, by its two sides.
        meaning: What config and tokenizers say about the tensors, as far as it is known.
        tied: Groups of names that are one tensor in the model.
        step, epoch: When it was taken, in optimizer steps and finished epochs; None for vectors extracted from files.
        precision_loss: Measured cost of a stored precision below float32.
        tensors: Shape, dtype and hash by name; empty until the vector is saved.
        derivation: How it was made, if it was made of other vectors.
        asked_for: Whether the coefficients were set by this process, and not read from a file: what only a file says is not applied where the
            alignments behind it are flat (see ``lata_lightning.merging.weigh``). Never stored.
        leave_out: Regular expressions of the names of tensors that were left out of it.
    """

    kind: Kind
    start: Start
    layers: LayerMap
    start_identity: Identity = Identity()
    tuned_identity: Identity = Identity()
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
        """Plain types for JSON."""
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
        """The inverse of ``to_json``; library versions are informative only."""
        entries = data["tensors"]
        places = {name: LayerPosition(entry["block"], entry["part"]) for name, entry in entries.items()}
        instruction = data["instruction_vector"]
        rule = data["weighting"]
        coefficients = data["coefficients"]
        layers = LayerMap(places, tuple(data["blocks"]))
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


def _texts(found: Any) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise ValueError(f"{found!r} is no list of texts")
    return tuple(found)


def read_manifest(directory: Path, *, sealed_only: bool = False) -> Manifest:
    """The manifest of a saved task vector.

    Args:
        directory: Of the vector.
        sealed_only: Whether to compare the manifest with the hash it holds of itself. Those of versions 1 and 2 hold none.

    Raises:
        SourceError: The directory holds none, or one of a newer format.
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
    """Write the manifest of a task vector, with a hash of itself."""
    (directory / MANIFEST_NAME).write_text(sealed(manifest.to_json()), "utf-8")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that shape the numbers, without importing them."""
    found = {}
    for name in ("lata_lightning", "lightning", "peft", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
