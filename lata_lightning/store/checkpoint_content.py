"""Finding the weights of the model in the content of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Generic, Protocol, TypeVar

from lata_lightning.errors import CorruptFileError, SourceError, first_three
from lata_lightning.layers import unwrapped
from lata_lightning.store.layout import Entry
from lata_lightning.store.pickles import Call, kind_of, mapping

_USUAL = ("state_dict", "model_state_dict", "model", "module", "model_state", "weights", "params", "network", "net")
"""Names under which training programs save the weights of a model, the most telling first."""
_OPTIMIZER = ("optim", "sched", "loops", "callbacks", "hyper_parameters", "rng", "scaler")


class UnknownModelError(SourceError):
    """A checkpoint holds no model of the name that was asked for."""


class Located(Protocol):
    """The location of a tensor in a file; hashable."""

    @property
    def entry(self) -> Entry:
        """Shape and dtype of the tensor."""


Location = TypeVar("Location", bound=Located)
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class LocatedWeights(Generic[Location]):
    """The tensors of a model.

    Attributes:
        locations: Location of each tensor, by name.
        tied: Other names of tensors that are listed once.
    """

    locations: dict[str, Location]
    tied: dict[str, str]

    @property
    def entries(self) -> dict[str, Entry]:
        """Shapes and dtypes, by name."""
        return {name: location.entry for name, location in self.locations.items()}

    def of(self, model: str | None, label: str) -> LocatedWeights[Location]:
        """Return the tensors of one module of several (see ``part_of``)."""
        if model is None:
            return self
        everything = {**self.locations, **{alias: self.locations[name] for alias, name in self.tied.items()}}
        return _listed_once(part_of(everything, model, label))


def part_of(entries: Mapping[str, _Item], model: str, label: str) -> dict[str, _Item]:
    """Return the entries of one module, under the names they have there.

    Args:
        entries: Anything by the full name of a tensor.
        model: Name of the module.
        label: Name of the whole, for messages.

    Raises:
        UnknownModelError: Nothing has such a name.
    """
    prefix = model + "."
    inside = {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}
    if not inside:
        raise unknown_model(model, {name.split(".")[0] for name in entries if "." in name}, label)
    return inside


def weights_in(
    content: object, tensor: Callable[[object], Location | None], label: str, model: str | None = None
) -> LocatedWeights[Location]:
    """Return the tensors of the model in a checkpoint: a state dict, or a dictionary with a state dict in it.

    Args:
        content: What the checkpoint holds.
        tensor: Returns the location of a tensor; None for any other value.
        label: Name of the checkpoint, for messages.
        model: Which model to take, where there are several: the key of a state dict, the name of a module, or both with a dot between them.

    Raises:
        UnknownModelError: It has no model of that name.
        SourceError: It has no model, or several.
    """
    top = mapping(content)
    if top is None:
        advice = "Save its state_dict() and give that." if isinstance(content, Call) else "Give the checkpoint of a model."
        raise SourceError(f"{label} holds a {kind_of(content)} where a state dict is expected. {advice}")
    _refuse_partial(top, label)
    state_dicts = {key: names for key, value in top.items() if isinstance(key, str) and (names := _tensors_of(value, tensor))}
    if model is not None:
        key = next((key for key in state_dicts if model == key or model.startswith(f"{key}.")), None)
        if key is not None:
            return _listed(top[key], tensor, f"{key!r} of {label}").of(model.removeprefix(key).removeprefix(".") or None, label)
    weights = _only_model(top, state_dicts, tensor, label)
    return weights.of(model, label)


def _only_model(
    top: Mapping[Any, Any], state_dicts: Mapping[str, set[str]], tensor: Callable[[object], Location | None], label: str
) -> LocatedWeights[Location]:
    usual = [key for key in _USUAL if key in state_dicts]
    if usual:
        first = usual[0]
        copies = [
            key
            for key, names in state_dicts.items()
            if key != first and not key.startswith(_OPTIMIZER) and _same_names(names, state_dicts[first])
        ]
        if copies:
            raise several_models([first, *copies], label)
        return _listed(top[first], tensor, f"{first!r} of {label}")
    others = [key for key in state_dicts if not key.startswith(_OPTIMIZER)]
    bare = sum(_is_tensor(value, tensor) for value in top.values())
    if bare > max((len(state_dicts[key]) for key in others), default=0):
        return _listed({key: value for key, value in top.items() if not str(key).startswith(_OPTIMIZER)}, tensor, label)
    if len(others) > 1:
        raise several_models(others, label)
    if not others:
        raise SourceError(
            f"{label} holds no weights: under {first_three(str(key) for key in top)} there are none. Give the checkpoint of a model."
        )
    return _listed(top[others[0]], tensor, f"{others[0]!r} of {label}")


def several_models(names: Iterable[str], label: str) -> SourceError:
    """Return the error about a checkpoint that holds more than one model."""
    listed = sorted(names)
    return SourceError(f"{label} must hold the model once; it holds {first_three(listed)}. Say which to take: --model {listed[0]}")


def unknown_model(model: str, names: Iterable[str], label: str) -> UnknownModelError:
    """Return the error about a model that a checkpoint does not hold."""
    listed = sorted(names)
    near = get_close_matches(model, listed, 1)
    return UnknownModelError(
        f"{label} holds nothing named {model!r}; it has {first_three(listed)}" + (f". Did you mean {near[0]!r}?" if near else ".")
    )


def _tensors_of(value: object, tensor: Callable[[object], Location | None]) -> set[str]:
    """Return the names of the tensors that are directly in a dictionary; none for anything else."""
    return {key for key, part in (mapping(value) or {}).items() if isinstance(key, str) and _is_tensor(part, tensor)}


def _is_tensor(value: object, tensor: Callable[[object], Location | None]) -> bool:
    try:
        return tensor(value) is not None
    except (SourceError, CorruptFileError):
        # It is a tensor; why it cannot be read is said when it is listed.
        return True


def _same_names(one: set[str], other: set[str]) -> bool:
    """Return whether two sets of names are those of one model, as of a model and its running average."""
    return 2 * len(one & other) > min(len(one), len(other))


def _listed(entries: object, tensor: Callable[[object], Location | None], label: str) -> LocatedWeights[Location]:
    locations: dict[str, Location] = {}
    odd: dict[str, object] = {}
    for key, value in (mapping(entries) or {}).items():
        location = tensor(value)
        if location is None:
            odd[str(key)] = value
        elif isinstance(key, str):
            locations[unwrapped(key)] = location
        else:
            raise SourceError(f"{label} must map names to tensors, and one of its keys is a {type(key).__name__}")
    # Beside its tensors a state dict may hold what modules save by get_extra_state, and numbers such as a step.
    odd = {
        name: value for name, value in odd.items() if not name.endswith("_extra_state") and not isinstance(value, str | int | float | None)
    }
    if odd:
        name = min(odd)
        raise SourceError(f"{label} must map names to tensors; others are {first_three(odd)}, and {name!r} is a {kind_of(odd[name])}")
    return _listed_once(locations)


def _listed_once(locations: Mapping[str, Location]) -> LocatedWeights[Location]:
    """Return the tensors with tied ones listed once, under their first name: two names of one location are tied."""
    first_at: dict[Location, str] = {}
    listed: dict[str, Location] = {}
    tied: dict[str, str] = {}
    for name, location in locations.items():
        if 0 not in location.entry.shape and location in first_at:
            tied[name] = first_at[location]
        else:
            listed[name], first_at[location] = location, name
    return LocatedWeights(listed, tied)


def _refuse_partial(top: Mapping[Any, Any], label: str) -> None:
    """Refuse the file of one process of DeepSpeed ZeRO: the full-precision weights are in other files."""
    if "ds_version" in top and top.get("param_shapes") is not None:
        raise SourceError(
            f"{label} is one file of a DeepSpeed ZeRO checkpoint, whose full-precision weights are spread over several. Make one file of them: "
            "python zero_to_fp32.py CHECKPOINT_DIRECTORY OUTPUT_DIRECTORY, and give that."
        )
