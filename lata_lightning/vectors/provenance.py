"""What a vector was made from: which weights, and, if it was made from other vectors, from which ones and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OUTSIDE = "outside the layers"
"""The key of all tensors that belong to no layer, where a derivation has numbers by layer."""
PROJECTED = "times the instruction vector"
"""The quantity that a projection measures: the multiple of the instruction vector that was removed from a layer."""


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


UNKNOWN = Identity()
"""The identity of weights of which nothing is known."""


@dataclass(frozen=True)
class Input:
    """One of the vectors that another vector was made from.

    Attributes:
        label: Its path, or its tuned and start side.
        tuned: Its tuned side.
        facts: What else is known of its contribution, such as the number of samples and where they come from.
    """

    label: str
    tuned: Identity = UNKNOWN
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerValues:
    """One quantity that was measured, layer by layer, when a vector was made from others.

    Attributes:
        name: The quantity.
        layers: Its values by layer, None where it has none; all tensors that belong to no layer have one value together, under ``OUTSIDE``.
        vector: Label of the input that it describes; None if it describes the result.
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
    """How a vector was made from others.

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
    measured: tuple[LayerValues, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Derivation:
        """Read what ``dataclasses.asdict`` wrote."""
        measured = tuple(LayerValues(**entry) for entry in data["measured"])
        inputs = tuple(Input(**{**entry, "tuned": Identity(**entry["tuned"])}) for entry in data["inputs"])
        return cls(**{**data, "inputs": inputs, "averaged": tuple(data["averaged"]), "measured": measured})

    @classmethod
    def from_older(cls, data: Mapping[str, Any]) -> Derivation | None:
        """Read the derivation in a manifest from before all derivations had one form; None if the vector was not made from others."""
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
            measured = LayerValues(PROJECTED, {**made["shares"], OUTSIDE: made["outside"]})
            return cls("projection", {"level": made["level"]}, measured=(measured,))
        return None
