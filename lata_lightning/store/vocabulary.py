"""Models with different vocabularies: which tensors have a row for each token, and which rows are the same token on both sides.

Rows are never moved: a token keeps its number. Where both sides have a tokenizer, a row is shared if it is the same token on both, or padding on
both; where one has none, if its number exists on both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from lata_lightning.errors import LayoutMismatchError, differing, first_three
from lata_lightning.layers import layer_map
from lata_lightning.store.checkpoint_names import under_checkpoint_names
from lata_lightning.store.meaning import check_same_tokens, stated_sizes
from lata_lightning.store.meta_model import meta_model
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.tokens import Tokens, within

_ROLES = ("embedding", "head", "other")


@dataclass(frozen=True)
class RowComparison:
    """Which rows of the vocabulary two models share, and which only one of them has.

    Attributes:
        axes: By tensor name, the axis along which it has one row for each token; empty where the models share every row.
        rows: Number of rows in the first model, and in the second.
        shared: Numbers of the rows that are the same token, or padding, in both models.
        extra: Numbers of the rows that only the second model has, ascending.
        own: Numbers of the rows that only the first model has, ascending.
        tokens: Token by row number, as far as tokens are known; None where no tokenizer is known, or no row differs.
        unknown: Why rows were compared by number; empty where they were compared by token.
    """

    axes: Mapping[str, int]
    rows: tuple[int, int] = (0, 0)
    shared: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()
    own: tuple[int, ...] = ()
    tokens: Mapping[int, str] | None = None
    unknown: str = ""


def vocabulary_axes(
    one: TensorSource, other: TensorSource, config: Mapping[str, Any] | None = None
) -> tuple[dict[str, int], tuple[int, int]]:
    """Return along which axis each tensor has one row per token, for the tensors whose number of rows differs between two models.

    Args:
        one: Weights of the first model.
        other: Weights of the second model, under the names of the first.
        config: Content of a config.json that applies to both models; used where neither source has a config of its own.

    Returns:
        The axis by tensor name; and the vocabulary size of the first and of the second model. An empty mapping and (0, 0) where all shapes are equal.

    Raises:
        LayoutMismatchError: The shapes differ along another axis, or no config names either size as a vocabulary size.
    """
    odd = [name for name in one.names if one.shape(name) != other.shape(name)]
    if not odd:
        return {}, (0, 0)
    roles = layer_map(one.names).outside()
    axes, sizes = {}, set()
    for name in odd:
        shapes = (one.shape(name), other.shape(name))
        different = [axis for axis, (left, right) in enumerate(zip(*shapes, strict=False)) if left != right]
        if len(shapes[0]) == len(shapes[1]) and len(different) == 1 and roles.get(name) in _ROLES:
            axes[name] = different[0]
            sizes.add((shapes[0][different[0]], shapes[1][different[0]]))
    foreign = set(odd) - set(axes)
    if foreign or len(sizes) > 1:
        first = min(foreign or odd)
        raise LayoutMismatchError(
            f"{one.label} and {other.label} may differ along the vocabulary only, but otherwise {differing(foreign or odd, len(one.names))}; "
            f"shapes of {first}: {one.shape(first)} and {other.shape(first)}"
        )
    size = sizes.pop()
    stated = [(side.label, length, side.config) for side, length in zip((one, other), size, strict=True) if side.config is not None]
    for label, length, own in stated:
        if length not in stated_sizes(own).values():
            raise LayoutMismatchError(
                f"{first_three(odd)} differ in size, and {length} is not the vocab_size in the config of {label}, so it is not their "
                "vocabulary that differs"
            )
    if not stated and not set(size) & set(stated_sizes(config or {}).values()):
        raise LayoutMismatchError(
            f"no config.json of {one.label} or {other.label} names {size[0]} or {size[1]} as vocab_size, so nothing tells that the vocabulary is what "
            f"differs in {first_three(odd)}. Give one of them as a Hugging Face directory."
        )
    return axes, size


def compare(
    one: TensorSource, other: TensorSource, tokens: tuple[Tokens, Tokens], config: Mapping[str, Any] | None = None
) -> RowComparison:
    """Return which rows of the vocabulary two models share, by token where both have a tokenizer, otherwise by row number.

    Args:
        one: Weights of the first model.
        other: Weights of the second model, under the names of the first.
        tokens: Tokens of the first model, and of the second.
        config: Content of a config.json that applies to both models; used where neither source has a config of its own.

    Raises:
        LayoutMismatchError: A row is one token in the first model and another in the second, or the models differ in more than the vocabulary.
    """
    axes, rows = vocabulary_axes(one, other, config)
    left, right = (side.by_row for side in tokens)
    if left is None or right is None:
        both = min(rows)
        extra, own = range(rows[0], rows[1]), range(rows[1], rows[0])
        known = None if left is None and right is None else {**(left or {}), **(right or {})}
        unknown = "; ".join(side.unknown for side in tokens if side.unknown)
        return RowComparison(axes, rows, tuple(range(both)), tuple(extra), tuple(own), known, unknown if axes else "")
    if axes:
        left, right = within(left, rows[0]), within(right, rows[1])
    check_same_tokens([(one.label, left), (other.label, right)])
    if not axes:
        if set(left) == set(right):
            return RowComparison({})
        # Both have a row for the token that only one knows, so no shape tells which axis is the vocabulary.
        axes, length = _probed_axes(one, other, config)
        rows = (length, length)
    extra_rows = {row for row in right if row < rows[1]} - set(left)
    own_rows = {row for row in left if row < rows[0]} - set(right)
    lone = extra_rows | own_rows
    shared = tuple(row for row in range(min(rows)) if row not in lone)
    return RowComparison(axes, rows, shared, tuple(sorted(extra_rows)), tuple(sorted(own_rows)), {**left, **right})


def resized_config(config: Mapping[str, Any], keys: Iterable[tuple[str, ...]], size: int) -> dict[str, Any]:
    """Return a copy of a config with another vocabulary size under the given keys."""
    changed = deepcopy(dict(config))
    for *parents, key in keys:
        part = changed
        for parent in parents:
            part = part[parent]
        part[key] = size
    return changed


def _probed_axes(one: TensorSource, other: TensorSource, config: Mapping[str, Any] | None) -> tuple[dict[str, int], int]:
    """Return the axis of the vocabulary by tensor name, and its size, from what changes in the meta model when its config asks for one row more."""
    config = one.config or other.config or config or {}
    stated = stated_sizes(config)
    if len(set(stated.values())) == 1:
        length = next(iter(stated.values()))
        shapes = [_shapes(settings) for settings in (config, resized_config(config, stated, length + 1))]
        axes = {
            name: next(axis for axis, size in enumerate(shape) if size != shapes[1][name][axis])
            for name, shape in shapes[0].items()
            if name in one.names and name in shapes[1] and shape != shapes[1][name]
        }
        if axes and all(one.shape(name)[axis] == length for name, axis in axes.items()):
            return axes, length
    raise LayoutMismatchError(
        f"the tokenizers of {one.label} and {other.label} differ, their numbers of rows do not, and the config does not tell which tensors hold the "
        "vocabulary. Resize the token embeddings of one of them."
    )


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    module = meta_model(config)
    if module is None:
        return {}
    return {name: tuple(tensor.shape) for name, tensor in under_checkpoint_names(module, module.state_dict()).items()}
