"""Vectors and merges between models with different vocabularies: bringing all sources to one set of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lata_lightning.errors import LataError, LayoutMismatchError, differing, first_three
from lata_lightning.layers import LayerRule
from lata_lightning.merging.rows import AssembledRows
from lata_lightning.moments import Start
from lata_lightning.store.meaning import Meaning, check_same_tokens, meaning_of, refuse_tokens, stated_sizes
from lata_lightning.store.names import LeaveOut
from lata_lightning.store.opening import open_source
from lata_lightning.store.pairing import pair_names
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.tokens import Tokens, read_tokens, within
from lata_lightning.store.views import Fingerprinted
from lata_lightning.store.vocabulary import RowComparison, compare, resized_config
from lata_lightning.vectors.differences import Difference
from lata_lightning.vectors.manifest import Kind
from lata_lightning.vectors.task_vector import TaskVector

Vocabulary = Literal["union", "onto"]
VOCABULARIES: tuple[Vocabulary, ...] = ("union", "onto")
Side = Literal["start", "tuned"]
SIDES: tuple[Side, ...] = ("start", "tuned")


@dataclass(frozen=True)
class Fitted:
    """Model and vectors with one set of rows.

    Attributes:
        onto: The weights to add to; rows it lacked come from the tuned models.
        vectors: The vectors; zero in every row that is not shared.
        rows: Number of rows of onto, before and after; None if no vocabulary differs.
        tokenizer: The source with the tokenizer for the result.
        config: The config.json of the result; None where onto has none.
        notes: Sentences about rows that are not shared.
    """

    onto: TensorSource
    vectors: list[TensorSource]
    rows: tuple[int, int] | None
    tokenizer: TensorSource
    config: Mapping[str, Any] | None
    notes: tuple[str, ...]


def between_vocabularies(
    start: str | Path | nn.Module | Mapping[str, Tensor] | TensorSource,
    tuned: str | Path | nn.Module | Mapping[str, Tensor] | TensorSource,
    vocabulary: Side,
    *,
    kind: Kind = "task",
    start_kind: Start = "instruct",
    layers: LayerRule | str | None = None,
    check_config: bool = True,
    leave_out: Sequence[str] | LeaveOut = (),
) -> tuple[TaskVector, tuple[str, ...]]:
    """Return the difference of two models with different vocabularies, over the rows they share.

    Args:
        start: The model that the fine-tune started from.
        tuned: The tuned model.
        kind: ``"task"`` or ``"instruction"``.
        start_kind: Whether ``start`` is the instruct model or the base model.
        layers: As for ``TaskVector.between``.
        check_config: As for ``TaskVector.between``.
        leave_out: As for ``TaskVector.between``.
        vocabulary: The side whose rows the vector has. Rows of this side that are not shared are zero, other rows are left out.

    Returns:
        The vector, and sentences about rows that are not shared. With equal vocabularies this is ``TaskVector.between`` and no sentence.

    Raises:
        LayoutMismatchError: A row is a different token on each side, or the models differ in more than the vocabulary.
        LataError: The side is unknown.
    """
    if vocabulary not in SIDES:
        raise LataError(f"unknown vocabulary {vocabulary!r}; choose one of {', '.join(SIDES)}")
    left_out = leave_out if isinstance(leave_out, LeaveOut) else LeaveOut(leave_out)
    one, other = pair_names(open_source(start), open_source(tuned), left_out)
    comparison = compare(one, other, (read_tokens(one.directory, one.label), read_tokens(other.directory, other.label)))
    if not comparison.axes:
        settings: dict[str, Any] = {"kind": kind, "start_kind": start_kind, "layers": layers, "check_config": check_config}
        return TaskVector.between(start, tuned, leave_out=leave_out, **settings), ()
    sides = Fingerprinted(one), Fingerprinted(other)
    frame, patched = sides if vocabulary == "start" else sides[::-1]
    size = comparison.rows[SIDES.index(vocabulary)]
    mixed = AssembledRows(patched, comparison.axes, size, [(frame, range(size)), (patched, comparison.shared)])
    ready: tuple[TensorSource, TensorSource] = (frame, mixed) if vocabulary == "start" else (mixed, frame)
    vector = TaskVector.between(*ready, kind=kind, start_kind=start_kind, layers=layers, check_config=check_config)
    vector = TaskVector(vector.tensors, replace(vector.manifest, leave_out=left_out.patterns))
    meaning = Meaning(vector.manifest.meaning.config, meaning_of(one).vocabularies + meaning_of(other).vocabularies, check_config)
    notes = [_by_number(comparison)] if comparison.unknown else []
    for side, rows in ((other, comparison.extra), (one, comparison.own)):
        if rows:
            what = "left out" if rows[-1] >= size else "zero"
            notes.append(
                f"only {side.label} has {_described(rows, comparison.tokens)}: no difference is known there, they are {what} in the vector"
            )
    difference = TaskVector(Difference(*ready, vector.tensors.names, hashed=sides), replace(vector.manifest, meaning=meaning))
    return difference, tuple(notes)


def resized(vector: TaskVector, like: TaskVector, config: Mapping[str, Any] | None) -> TaskVector:
    """Return a vector with the rows of another one: rows it lacks are zero, rows that the other lacks are left out.

    Rows are matched by token where both record theirs, and by number otherwise.

    Args:
        vector: The vector to resize, such as an instruction vector.
        like: The vector whose rows to take.
        config: Config of a model with the vocabulary of one of them.

    Raises:
        LayoutMismatchError: The vectors differ in more than the vocabulary, or a row is a different token in each.
    """
    if set(vector) != set(like):
        return vector
    mine, theirs = (side.manifest.meaning.vocabularies for side in (vector, like))
    shared = not mine or not theirs or any(side in mine for side in theirs)
    tokens = Tokens(None), Tokens(None)
    if not shared:
        tokens = Tokens(theirs[0].compared_with(mine[0])), Tokens(mine[0].compared_with(theirs[0]))
        if None in (tokens[0].by_row, tokens[1].by_row):
            refuse_tokens(like.label, theirs[0], vector.label, mine[0])
    comparison = compare(like.tensors, vector.tensors, tokens, config)
    if shared and not comparison.axes:
        return vector
    manifest = replace(vector.manifest, meaning=replace(vector.manifest.meaning, vocabularies=theirs or mine))
    if not comparison.axes:
        return TaskVector(vector.tensors, manifest)
    frozen = {name: replace(entry, shape=like.shape(name)) for name, entry in manifest.tensors.items() if entry.unchanged}
    source = AssembledRows(vector.tensors, comparison.axes, comparison.rows[0], [(vector.tensors, comparison.shared)])
    return TaskVector(source, replace(manifest, tensors=frozen))


def fit_vocabularies(
    onto: TensorSource,
    vectors: Sequence[TensorSource],
    tuned: Sequence[TensorSource | None],
    meanings: Sequence[Meaning],
    vocabulary: Vocabulary,
) -> Fitted:
    """Bring a model and vectors to one set of rows for a merge.

    Args:
        onto: Weights to add to; vectors and tuned models are under its names.
        vectors: With the rows of ``onto``, of the tuned model, or of another size.
        tuned: The tuned model of each vector, where available.
        meanings: The record of the tokens of each vector.
        vocabulary: ``"onto"`` keeps the rows of ``onto``; ``"union"`` adds those that only a tuned model has, with its values.

    Raises:
        LayoutMismatchError: A row is a different token on each side, the models differ in more than the vocabulary, or a union needs the rows of a
            tuned model that is not given.
    """
    own = read_tokens(onto.directory, onto.label)
    known = [own if model is None else read_tokens(model.directory, model.label) for model in tuned]
    comparisons = []
    for vector, model, tokens, meaning in zip(vectors, tuned, known, meanings, strict=True):
        other = _tokens_of(vector.label, meaning, onto) if model is None else tokens
        comparison = compare(onto, vector if model is None else model, (own, other))
        if vocabulary == "union" and model is None and comparison.extra:
            raise LayoutMismatchError(
                f"{vector.label} has {comparison.rows[1]} rows and {onto.label} {comparison.rows[0]}: a vector holds differences, so a union cannot take "
                "the new rows from it. Give the tuned model itself in its place, or keep the rows of the model (vocabulary='onto', --vocabulary onto)."
            )
        comparisons.append(comparison)
    axes = {name: axis for comparison in comparisons for name, axis in comparison.axes.items()}
    if not axes:
        return Fitted(onto, list(vectors), None, onto, onto.config, ())
    before = next(comparison.rows[0] for comparison in comparisons if comparison.axes)
    sides = [(onto, own, before)]
    sides += [
        (model, tokens, size.rows[1] or before) for model, tokens, size in zip(tuned, known, comparisons, strict=True) if model is not None
    ]
    tokenizers = [(side, within(tokens.by_row, size)) for side, tokens, size in sides if tokens.by_row is not None]
    if vocabulary == "union":
        check_same_tokens([(side.label, by_row) for side, by_row in tokenizers])
    added_rows = {row for comparison in comparisons for row in comparison.extra}
    beyond = [comparison.rows[1] for comparison in comparisons if comparison.extra and comparison.extra[-1] >= before]
    after = max([before, *beyond]) if vocabulary == "union" else before
    notes = _merge_notes(onto, vectors, tuned, comparisons, vocabulary)
    readers = []
    for vector, comparison in zip(vectors, comparisons, strict=True):
        name, axis = next(iter(axes.items()))
        # The difference of a row that is new to the model is relative to weights that the model does not have.
        new = added_rows if vocabulary == "union" else set(comparison.extra)
        rows = set(range(min(before, vector.shape(name)[axis]))) - new - set(comparison.own)
        readers.append(AssembledRows(vector, axes, after, [(vector, rows)]))
    weights, tokenizer, config = onto, onto, onto.config
    if vocabulary == "union" and any(comparison.extra for comparison in comparisons):
        models = [(model, comparison) for model, comparison in zip(tuned, comparisons, strict=True) if model is not None]
        # A row comes from the first model that has its token; padding never overwrites a token.
        padding = [(model, range(before, min(after, comparison.rows[1]))) for model, comparison in models if comparison.axes]
        added = [(model, comparison.extra) for model, comparison in reversed(models) if comparison.extra]
        weights = AssembledRows(onto, axes, after, [(onto, range(before)), *padding, *added])
        tokenizer, spoken = _largest(tokenizers) if tokenizers else (onto, added_rows)
        if not added_rows <= set(spoken):
            notes = (*notes, f"the tokenizer of {tokenizer.label} is kept, which has no token for every new row")
        config = _with_size(onto.config, comparisons, models, after)
    wrong = {name for name in weights.names for reader in readers if reader.shape(name) != weights.shape(name)}
    if wrong:
        raise LayoutMismatchError(
            f"{onto.label} and the vectors must have the same shapes but for the vocabulary; {differing(wrong, len(weights.names))}"
        )
    return Fitted(weights, list(readers), (before, after), tokenizer, config, notes)


def _tokens_of(label: str, meaning: Meaning, onto: TensorSource) -> Tokens:
    """Return the tokens of a saved vector, as far as they follow from those of the model it is added to.

    Raises:
        LayoutMismatchError: They are known to differ, or do not follow.
    """
    own = meaning_of(onto).vocabularies
    if not own or own[0].tokens.by_row is None or not meaning.vocabularies:
        return Tokens(None, f"{label} is a vector, which holds no tokenizer")
    if own[0] in meaning.vocabularies:
        # Rows that only one side of the vector has are zero in it.
        return Tokens(None)
    known = meaning.vocabularies[-1].compared_with(own[0])
    if known is None:
        refuse_tokens(onto.label, own[0], label, meaning.vocabularies[-1])
    return Tokens(known)


def check_vocabulary(vocabulary: str) -> Vocabulary:
    """Return the choice itself.

    Raises:
        LataError: There is no such choice.
    """
    if vocabulary not in VOCABULARIES:
        raise LataError(f"unknown vocabulary {vocabulary!r}; choose one of {', '.join(VOCABULARIES)}")
    return vocabulary


def _merge_notes(
    onto: TensorSource,
    vectors: Sequence[TensorSource],
    tuned: Sequence[TensorSource | None],
    comparisons: Sequence[RowComparison],
    vocabulary: Vocabulary,
) -> tuple[str, ...]:
    notes, taken = [], set[int]()
    for vector, model, comparison in zip(vectors, tuned, comparisons, strict=True):
        label = vector.label if model is None else model.label
        if comparison.unknown:
            notes.append(_by_number(comparison))
        if comparison.extra:
            new = [row for row in comparison.extra if row not in taken]
            what = "taken from it" if vocabulary == "union" else "dropped"
            if new:
                notes.append(f"only {label} has {_described(new, comparison.tokens)}: they are {what}")
            if vocabulary == "union":
                if len(new) < len(comparison.extra):
                    notes.append(f"{label} adds rows that a model before it adds too: they are taken from the first")
                taken |= set(new)
        if comparison.own:
            notes.append(f"{label} lacks {_described(comparison.own, comparison.tokens)} of {onto.label}: they stay as they are")
    return tuple(notes)


def _by_number(comparison: RowComparison) -> str:
    return f"{comparison.unknown}: rows are taken to be the same token where they have the same number"


def _described(rows: Sequence[int], tokens: Mapping[int, str] | None) -> str:
    named = [tokens[row] for row in rows if row in tokens] if tokens else []
    span = f"{len(rows)} rows from {rows[0]} on" if len(rows) > 1 else f"row {rows[0]}"
    shown = ", ".join(repr(token) for token in named[:3])
    return f"{span} ({shown}{', …' if len(named) > 3 else ''})" if named else span


def _largest(sides: Sequence[tuple[TensorSource, Mapping[int, str]]]) -> tuple[TensorSource, Mapping[int, str]]:
    """Return the side whose tokenizer has every token of all sides, and its tokens."""
    everything = {row: token for _, by_row in sides for row, token in by_row.items()}
    best, tokens = max(sides, key=lambda side: len(side[1]))
    lost = [token for row, token in everything.items() if row not in tokens]
    if lost:
        raise LayoutMismatchError(
            f"a union needs one tokenizer that knows all tokens; that of {best.label}, the largest, lacks {first_three(lost)}. Add them to it first."
        )
    return best, tokens


def _with_size(
    config: Mapping[str, Any] | None, comparisons: Sequence[RowComparison], models: Sequence[tuple[TensorSource, RowComparison]], size: int
) -> Mapping[str, Any] | None:
    """Return the config with the new size in the fields that give the size of the changed vocabulary."""
    before = next(comparison.rows[0] for comparison in comparisons if comparison.axes)
    if config is None or size == before:
        return config
    fields = {field for field, stated in stated_sizes(config).items() if stated == before}
    for model, comparison in models:
        if model.config is not None and comparison.rows[1] != before and comparison.axes:
            # Another part of the model may have a vocabulary of the same size, which does not change.
            fields &= {field for field, stated in stated_sizes(model.config).items() if stated == comparison.rows[1]}
    return resized_config(config, fields, size)
