"""Which part of what a checkpoint holds is the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from lata_lightning.errors import CorruptFileError, SourceError, first_three
from lata_lightning.layers import unwrapped
from lata_lightning.store.layout import Span
from lata_lightning.store.pickles import Call, kind_of, mapping

_USUAL = ("state_dict", "model_state_dict", "model", "module", "model_state", "weights", "params", "network", "net")
"""Names under which training programs save the weights of a model, the most telling first."""
_OPTIMIZER = ("optim", "sched", "loops", "callbacks", "hyper_parameters", "rng", "scaler")


class Weights(NamedTuple):
    """The tensors of a model by name, and other names of tensors that are listed once."""

    spans: dict[str, Span]
    tied: dict[str, str]


def weights_in(content: object, tensor: Callable[[object], Span | None], label: str, model: str | None = None) -> Weights:
    """The tensors of the model in a checkpoint: a state dict, or the one that stands under a name in a dictionary.

    Args:
        content: What the checkpoint holds.
        tensor: Where a tensor lies; None for what is no tensor.
        label: Name of the checkpoint, for messages.
        model: Name of the dictionary, where it holds several models.

    Raises:
        SourceError: It holds no model, or several.
    """
    top = mapping(content)
    if top is None:
        advice = "Save its state_dict() and give that." if isinstance(content, Call) else "Give the checkpoint of a model."
        raise SourceError(f"{label} holds a {kind_of(content)} where a state dict is expected. {advice}")
    _refuse_partial(top, label)
    holders = {key: held for key, value in top.items() if isinstance(key, str) and (held := _tensors_of(value, tensor))}
    if model is not None and model in holders:
        return _listed(mapping(top[model]) or {}, tensor, f"{model!r} of {label}")
    usual = [key for key in _USUAL if key in holders]
    if usual:
        first = usual[0]
        copies = [
            key for key, held in holders.items() if key != first and not key.startswith(_OPTIMIZER) and _same_names(held, holders[first])
        ]
        if copies:
            raise several_models([first, *copies], label)
        return _listed(mapping(top[first]) or {}, tensor, f"{first!r} of {label}")
    if any(tensor(value) is not None for value in top.values()):
        return _listed(top, tensor, label)
    others = [key for key in holders if not key.startswith(_OPTIMIZER)]
    if len(others) > 1:
        raise several_models(others, label)
    if not others:
        raise SourceError(
            f"{label} holds no weights: under {first_three(str(key) for key in top)} there are none. Give the checkpoint of a model."
        )
    return _listed(mapping(top[others[0]]) or {}, tensor, f"{others[0]!r} of {label}")


def several_models(names: Iterable[str], label: str) -> SourceError:
    """The error about a checkpoint that holds more than one model."""
    listed = sorted(names)
    return SourceError(f"{label} must hold the model once; it holds {first_three(listed)}. Say which is meant: --model {listed[0]}")


def unknown_model(model: str, names: Iterable[str], label: str) -> SourceError:
    """The error about a model that a checkpoint does not hold."""
    listed = sorted(names)
    near = get_close_matches(model, listed, 1)
    return SourceError(
        f"{label} holds nothing named {model!r}; it has {first_three(listed)}" + (f". Did you mean {near[0]!r}?" if near else ".")
    )


def _tensors_of(value: object, tensor: Callable[[object], Span | None]) -> set[str]:
    """Names of the tensors that are directly in a dictionary; none for anything else."""
    return {key for key, part in (mapping(value) or {}).items() if isinstance(key, str) and _is_tensor(part, tensor)}


def _is_tensor(value: object, tensor: Callable[[object], Span | None]) -> bool:
    try:
        return tensor(value) is not None
    except (SourceError, CorruptFileError):
        # It is one, and the reason why it cannot be read is said when it is listed.
        return True


def _same_names(one: set[str], other: set[str]) -> bool:
    """Whether two sets of tensors are those of one model, as the running average and the model itself."""
    return 2 * len(one & other) > min(len(one), len(other))


def _listed(entries: Mapping[Any, Any], tensor: Callable[[object], Span | None], label: str) -> Weights:
    spans: dict[str, Span] = {}
    tied: dict[str, str] = {}
    first_at: dict[Span, str] = {}
    odd: dict[str, object] = {}
    for key, value in entries.items():
        name = unwrapped(key) if isinstance(key, str) else key
        span = tensor(value)
        if span is None:
            odd[str(name)] = value
        elif not isinstance(name, str):
            raise SourceError(f"{label} must map names to tensors, and one of its keys is a {type(name).__name__}")
        elif 0 not in span.entry.shape and span in first_at:
            tied[name] = first_at[span]
        else:
            spans[name] = span
            first_at[span] = name
    # Beside its tensors a state dict may hold what modules save by get_extra_state, and numbers such as a step.
    odd = {
        name: value for name, value in odd.items() if not name.endswith("_extra_state") and not isinstance(value, str | int | float | None)
    }
    if odd:
        name = min(odd)
        raise SourceError(f"{label} must map names to tensors; others are {first_three(odd)}, and {name!r} is a {kind_of(odd[name])}")
    return Weights(spans, tied)


def _refuse_partial(top: Mapping[Any, Any], label: str) -> None:
    """Refuse the file of one process of DeepSpeed ZeRO: the full-precision weights are in other files."""
    if "ds_version" in top and top.get("param_shapes") is not None:
        raise SourceError(
            f"{label} is one file of a DeepSpeed ZeRO checkpoint, whose full-precision weights are spread over several. Make one file of them: "
            "python zero_to_fp32.py CHECKPOINT_DIRECTORY OUTPUT_DIRECTORY, and give that."
        )
