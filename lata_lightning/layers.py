"""Which block and which part of a model a tensor belongs to.

A *layer* is the unit that gets a coefficient: a transformer block (default), one of its submodules, or a single tensor. One algorithm finds the
blocks of every layout. It looks for numbered lists in tensor names (``model.layers.3…``, ``encoder.block.0.layer.1…``). The children of a list that
contains attention are blocks. Lists inside a block (experts, T5's sub-layers) stay in the block; lists of blocks inside stages (Swin, SegFormer) are
followed down. If the module is available, its structure decides which numbers are lists and which modules are attention, norms, embeddings or heads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, cast, get_args

from typing_extensions import override

from lata_lightning.errors import LataError, first_three

if TYPE_CHECKING:
    from torch import nn

Level = Literal["block", "submodule", "tensor"]
LEVELS: tuple[Level, ...] = get_args(Level)
LayerRule = Callable[[str], "str | None"]

STATISTICS = "statistics"
"""Role of a buffer, such as the running mean of a batch norm: it is no weight, and follows the data."""
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_PARTS = ("attention", "cross_attention", "mlp", "norm", "other")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_CROSS = re.compile(r"cross|encdec|encoder_attn|multihead_attn", re.IGNORECASE)
_NORM = re.compile(r"norm|^ln(_|\d|$)|^bn\d*$", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|densereludense|densegateddense|experts?|moe|router|^ff|^fc|^intermediate$|^output$|^(linear|lin)\d$|"
    r"^(up|down|gate)_proj$|^gate$|^w[123]$|^w[io](_\d)?$|_h$",
    re.IGNORECASE,
)
_EMBEDDING = re.compile(r"embed(?!_out)|^wte$|^wpe$|^shared$|patch|position|cls_token|mask_token", re.IGNORECASE)
_HEAD = re.compile(r"(?<!multi)(?<!multi_)head|embed_out|classifier|^score$|qa_outputs|pooler|predictions|^cls$", re.IGNORECASE)


class LayerPosition(NamedTuple):
    """Position of a tensor: its block (None outside the blocks), and the part of the block or the role outside."""

    block: str | None
    part: str


@dataclass(frozen=True)
class LayerMap:
    """The position of every tensor of a model, with blocks in the order in which the model runs them.

    Attributes:
        positions: Tensor name to position. Parts inside a block: ``attention``, ``cross_attention``, ``mlp``, ``norm``, ``other``.
            Roles outside: ``embedding``, ``head``, ``final_norm``, ``other``, and ``statistics`` for buffers.
        blocks: Names of the blocks in order.
    """

    positions: Mapping[str, LayerPosition]
    blocks: tuple[str, ...]

    def layer_of(self, name: str, level: Level = "block") -> str | None:
        """Return the name of the layer that a tensor belongs to; None for a tensor outside the blocks."""
        block, part = self.positions[name]
        if block is None:
            return None
        return {"block": block, "submodule": f"{block}.{part}", "tensor": name}[check_level(level)]

    def layers(self, level: Level = "block") -> dict[str, list[str]]:
        """Return tensor names by layer, with layers in order."""
        order = {block: index for index, block in enumerate(self.blocks)}
        inside = [name for name, position in self.positions.items() if position.block is not None]
        # Equal alignments are ranked in layer order, which must not depend on the order of tensors in a file.
        inside.sort(
            key=lambda name: (order[cast(str, self.positions[name].block)], _PARTS.index(self.positions[name].part), _natural(name))
        )
        names_by_layer: dict[str, list[str]] = {}
        for name in inside:
            names_by_layer.setdefault(cast(str, self.layer_of(name, level)), []).append(name)
        return names_by_layer

    def outside(self) -> dict[str, str]:
        """Return the role by tensor name, for the weights that belong to no block."""
        return {name: at.part for name, at in self.positions.items() if at.block is None and at.part != STATISTICS}

    @cached_property
    def statistics(self) -> frozenset[str]:
        """Names of the tensors that are no weights but buffers, which are measured nowhere and never scaled."""
        return frozenset(name for name, at in self.positions.items() if at.part == STATISTICS)


class DeferredLayerMap(LayerMap):
    """A layer map that is built on first use, as building the structure of a model takes seconds, and many commands do not need it.

    Args:
        make: Makes the map.
        statistics: Names of the buffers among the tensors.
    """

    def __init__(self, make: Callable[[], LayerMap], statistics: frozenset[str] = frozenset()) -> None:
        self.__dict__.update(_make=make, statistics=statistics)

    @cached_property
    def _map(self) -> LayerMap:
        made: LayerMap = self.__dict__["_make"]()
        return made

    @property
    @override
    def positions(self) -> Mapping[str, LayerPosition]:
        """Block and part by tensor name."""
        return self._map.positions

    @property
    @override
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks in order."""
        return self._map.blocks

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerMap) and (self.positions, self.blocks) == (other.positions, other.blocks)

    __hash__ = None  # type: ignore[assignment]


def check_level(level: str) -> Level:
    """Return the level; refuse any other word with a list of the choices."""
    if level not in LEVELS:
        raise LataError(f"unknown level {level!r}; choose one of {', '.join(LEVELS)}")
    return level


def unwrapped(name: str) -> str:
    """Return the name of a tensor or module without the parts that wrappers add: torch.compile, activation checkpointing and FSDP."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def layer_map(names: Iterable[str], *, structure: nn.Module | None = None, rule: LayerRule | str | None = None) -> LayerMap:
    """Return the block and the part of every named tensor.

    Args:
        names: Tensor names as in a Hugging Face checkpoint or ``named_parameters()``.
        structure: The module the names come from (meta tensors suffice). Without it names alone decide.
        rule: For modules whose layout is not recognised: a callable from tensor name to block name (None: outside), or a regular
            expression searched in the name, whose group ``block`` (else the whole match) is the block name.

    Returns:
        A map of every name. All tensors are outside the blocks if no part of the model repeats.

    Raises:
        LataError: The rule is no valid regular expression, or assigns no tensor to a block.
    """
    names = list(names)
    # A wrapper and its module have one name; the module comes later and counts.
    modules = {unwrapped(path): module for path, module in structure.named_modules()} if structure is not None else {}
    if rule is not None:
        block_of = _by_rule(names, rule)
        blocks = sorted({block for block in block_of.values() if block is not None}, key=_natural)
    else:
        blocks = _find_blocks(names, modules)
        if modules and not blocks:
            # Some checkpoints have other names than the modules of their architecture: then names alone decide.
            modules = {}
            blocks = _find_blocks(names, modules)
        block_of = _by_prefix(names, blocks)
    positions = {}
    for name in names:
        block = block_of[name]
        positions[name] = LayerPosition(block, part_of(name, block, modules) if block is not None else _role(name, modules))
    return LayerMap(positions, tuple(blocks))


def _by_rule(names: list[str], rule: LayerRule | str) -> dict[str, str | None]:
    if isinstance(rule, str):
        try:
            pattern = re.compile(rule)
        except re.error as error:
            raise LataError(f"the layer rule {rule!r} is no regular expression: {error}") from error

        def block_by_pattern(name: str) -> str | None:
            match = pattern.search(name)
            return None if match is None else match.group("block" if "block" in pattern.groupindex else 0)

        rule = block_by_pattern
    block_of = {name: rule(name) for name in names}
    if not any(block_of.values()):
        raise LataError(f"the layer rule assigns none of the tensors to a block; the tensors are {first_three(names)}")
    return block_of


class _List(NamedTuple):
    """A numbered list in the names: its path and, by child path, the names below each child (relative to it)."""

    path: str
    children: dict[str, set[str]]


def _lists_below(names: Iterable[str], root: str, modules: Mapping[str, nn.Module]) -> dict[str, _List]:
    """Return the outermost numbered lists below a root path, by list path."""
    lists: dict[str, _List] = {}
    for name in names:
        if root and not name.startswith(root + "."):
            continue
        parts = name.split(".")
        for position in range(root.count(".") + 1 if root else 0, len(parts) - 1):
            if not parts[position].isdigit():
                continue
            path, child = ".".join(parts[:position]), ".".join(parts[: position + 1])
            if modules and not _is_list(modules.get(path)):
                continue
            lists.setdefault(path, _List(path, {})).children.setdefault(child, set()).add(".".join(parts[position + 1 :]))
            break
    return lists


def _is_list(module: nn.Module | None) -> bool:
    from torch import nn

    return isinstance(module, nn.ModuleList | nn.Sequential)


def _find_blocks(names: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    lists = [stack for stack in _lists_below(names, "", modules).values() if len(stack.children) > 0]
    stacks = [stack for stack in lists if any(_holds_attention(child, stack, modules) for child in stack.children)]
    if not stacks:
        stacks = [stack for stack in lists if _repeats(stack, modules)]
    if modules:
        order = {path: index for index, path in enumerate(modules)}
        stacks.sort(key=lambda stack: order[stack.path])
    else:
        # Names alone do not tell the order, but an encoder runs before its decoder.
        stacks.sort(key=lambda stack: ("decoder" in stack.path, _natural(stack.path)))
    return [block for stack in stacks for block in _descend(names, stack, modules)]


def _descend(names: list[str], stack: _List, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the blocks of a stack: its children, or the blocks of a child that is a stage of whole blocks."""
    for child in sorted(stack.children, key=_natural):
        below = [name for name in names if name.startswith(child + ".")]
        inner = [
            stage
            for stage in _lists_below(below, child, modules).values()
            if all(_holds_attention(grandchild, stage, modules) for grandchild in stage.children)
            and (len(stage.children) == 1 or _repeats(stage, modules))
        ]
        if inner:
            for stage in inner:
                yield from _descend(below, stage, modules)
        else:
            yield child


def _holds_attention(child: str, stack: _List, modules: Mapping[str, nn.Module]) -> bool:
    if modules:
        below = (type(module).__name__ for path, module in modules.items() if path.startswith(child + "."))
        return any(_ATTENTION.search(kind) and not _NORM.search(kind) for kind in below)
    return any(
        _ATTENTION.search(component) and not _NORM.search(component) for suffix in stack.children[child] for component in suffix.split(".")
    )


def _repeats(stack: _List, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether at least two children are alike: of one class or, from names alone, with a tensor name in common."""
    children = list(stack.children)
    kinds = [{type(modules[child]).__name__} for child in children] if modules else [stack.children[child] for child in children]
    return any(first & second for index, first in enumerate(kinds) for second in kinds[index + 1 :])


def _by_prefix(names: list[str], blocks: list[str]) -> dict[str, str | None]:
    known = set(blocks)
    block_of: dict[str, str | None] = {}
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
        block_of[name] = next((prefix for prefix in prefixes if prefix in known), None)
    return block_of


def part_of(name: str, block: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the part of a block that a tensor belongs to, by the outermost word of its path that names a part, else by the outermost class."""
    parts = name.split(".")
    below = range(block.count(".") + 1 if name.startswith(block + ".") else 0, len(parts))
    words = [parts[position] for position in below]
    kinds = [_kind(modules.get(".".join(parts[: position + 1]))) for position in below]
    for word in words + kinds:
        if _NORM.search(word):
            return "norm"
        if _ATTENTION.search(word):
            return "cross_attention" if _CROSS.search(word) else "attention"
        if _MLP.search(word):
            return "mlp"
    return "other"


def _role(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the role of a tensor outside the blocks, by the same rule."""
    parts = name.split(".")
    kinds = [_kind(modules.get(".".join(parts[: position + 1]))) for position in range(len(parts))]
    for word in parts + kinds:
        if _EMBEDDING.search(word):
            return "embedding"
        if _HEAD.search(word):
            return "head"
        if _NORM.search(word):
            return "final_norm"
    return "other"


def _kind(module: nn.Module | None) -> str:
    """Return the class name of a module without children; a container may be named after any of its parts."""
    return type(module).__name__ if module is not None and not any(module.children()) else ""


def _natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that puts layer 2 before layer 10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part)
