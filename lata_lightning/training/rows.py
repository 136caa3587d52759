"""Rows of tokens, and the order in which batches are made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lata_lightning.errors import LataError, first_three

IGNORED = -100


class Row(NamedTuple):
    """One training sequence: token ids, and labels that are -100 where nothing is learned; both of shape (tokens,).

    Several sequences packed into one row have ``position_ids`` of the same shape, which begin at 0 with each of them.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None


class MixtureBatchSampler(DistributedSampler[list[int]]):
    """Batches of row numbers: chat rows drawn by group shares, and raw-text windows spread evenly between them.

    Every group is gone through in a shuffled order before a row of it comes again in the same epoch. Of several processes each takes every n-th
    batch of one common order, and all of them the same number; so ``batches`` is the number of steps, whatever the number of processes.
    """

    def __init__(
        self,
        groups: Sequence[range],
        shares: Sequence[float],
        windows: range,
        raw_share: float,
        rows_per_batch: int,
        windows_per_batch: int,
        batches: int,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        # A DistributedSampler is what Lightning leaves in its place under DDP, instead of trying to wrap it.
        super().__init__(cast("Dataset[Any]", range(len(windows))), num_replicas, rank, seed=seed)
        self.groups = groups
        self.shares = torch.tensor(shares, dtype=torch.float64)
        self.windows = windows
        self.raw_share = raw_share
        self.rows_per_batch = rows_per_batch
        self.windows_per_batch = windows_per_batch
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        orders = [_endless_shuffle(group, generator) for group in self.groups]
        for number in range(self.batches * self.num_replicas):
            # Every process draws the batches of all, so that all go through one order.
            mine = number % self.num_replicas == self.rank
            # Raw batches are those at which the running total of raw text passes a whole number.
            if int((number + 1) * self.raw_share) > int(number * self.raw_share):
                starts = torch.randint(len(self.windows), (self.windows_per_batch,), generator=generator)
                batch = [self.windows[start] for start in starts.tolist()]
            else:
                drawn = torch.multinomial(self.shares, self.rows_per_batch, replacement=True, generator=generator)
                batch = [next(orders[group]) for group in drawn.tolist()]
            if mine:
                yield batch


class Rows(Dataset[Row]):
    """Chat rows first, then one row for every place at which a window of raw text can start."""

    def __init__(self, rows: list[Row], raw: Tensor, context_length: int) -> None:
        self.rows = rows
        self.raw = raw
        self.context_length = context_length
        self.windows = range(len(rows), len(rows) + (len(raw) - context_length + 1 if len(raw) else 0))

    def __len__(self) -> int:
        return len(self.rows) + len(self.windows)

    def __getitem__(self, index: int) -> Row:
        if index < len(self.rows):
            return self.rows[index]
        start = index - len(self.rows)
        window = self.raw[start : start + self.context_length].long()
        return Row(window, window)


class Batches(Dataset[dict[str, Tensor]]):
    """Whole batches, by the numbers of their rows: what a sampler of batches draws from."""

    def __init__(self, rows: Dataset[Row], pad_token_id: int) -> None:
        self.rows = rows
        self.pad_token_id = pad_token_id

    def __getitem__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        return collate([self.rows[number] for number in numbers], self.pad_token_id)


def chat_rows(tokenizer: Any, pairs: Sequence[tuple[str, str]], longest: int) -> list[Row]:
    """Pairs as tokens in the tokenizer's chat format, learned from the answer's first token to the end of the turn.

    Args:
        tokenizer: Hugging Face tokenizer with a chat template.
        pairs: (prompt, answer) pairs.
        longest: Most tokens a row may have.

    Raises:
        LataError: A row is longer than that, or the template renders a question differently once it is answered.
    """
    pieces = [
        conversation_pieces(tokenizer, [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
        for prompt, answer in pairs
    ]
    changed = [pair[0] for pair, found in zip(pairs, pieces, strict=True) if found is None]
    if changed:
        raise LataError(
            "the chat template must render a question the same way with and without its answer, "
            "so that the answer's tokens are known; "
            f"different for {first_three(changed)}"
        )
    rows = [row_of(tokenizer, found) for found in pieces if found is not None]
    too_long = [prompt for (prompt, _), row in zip(pairs, rows, strict=True) if len(row.input_ids) > longest]
    if too_long:
        raise LataError(f"rows may have at most {longest} tokens; too long are {first_three(too_long)}")
    return rows


def conversation_pieces(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]] | None:
    """A conversation as the chat template renders it, cut where what is learned begins and ends.

    Args:
        tokenizer: Hugging Face tokenizer with a chat template.
        messages: Turns with ``role`` and ``content``; what follows the last turn of the assistant is left out.

    Returns:
        Pieces of text and whether they are learned: every turn of the assistant, with what the template puts after it. None where the template
        renders the beginning of a conversation differently once it goes on.

    Raises:
        LataError: The template refuses the conversation, or no turn is the assistant's.
    """
    pieces: list[tuple[str, bool]] = []
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            question = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
            answered = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        except TemplateError as error:
            raise LataError(f"the chat template refuses a conversation: {error}; it begins {str(messages[0]['content'])[:40]!r}") from error
        if not question.startswith(done) or not answered.startswith(question):
            return None
        pieces += [(question[len(done) :], False), (answered[len(question) :], True)]
        done = answered
    if not pieces:
        begins = str(messages[0]["content"])[:40] if messages else ""
        raise LataError(f"every conversation needs a turn of the assistant to learn; there is none in the one that begins {begins!r}")
    return pieces


def row_of(tokenizer: Any, pieces: Iterable[tuple[str, bool]]) -> Row:
    """Pieces of text as one row, learned where they say so. No token straddles two pieces, as in generation."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in pieces:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += tokens
        labels += tokens if learned else [IGNORED] * len(tokens)
    return Row(torch.tensor(ids), torch.tensor(labels))


def packed(rows: Iterable[Row], context_length: int) -> Iterator[Row]:
    """Rows one after another in as few longer ones as their order allows; no row is cut.

    ``position_ids`` begin at 0 with every row, by which transformers keeps its models from looking across the border; the first token of a row is
    not learned, as nothing before it says what it is.

    Args:
        rows: At most ``context_length`` tokens each.
        context_length: Most tokens of a packed row.
    """
    held: list[Row] = []
    for row in rows:
        if held and sum(len(other.input_ids) for other in held) + len(row.input_ids) > context_length:
            yield _joined(held)
            held = []
        held.append(row)
    if held:
        yield _joined(held)


def raw_tokens(tokenizer: Any, texts: Iterable[str], context_length: int) -> Tensor:
    """All texts as one line of tokens, the end token after each; shape (tokens,), empty without texts.

    Raises:
        LataError: There are texts, but together they do not fill one window of ``context_length`` tokens.
    """
    pieces = [
        # Not verbose: a document may be longer than the model's context, its windows are not.
        torch.tensor(
            [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id],
            dtype=torch.int32,
        )
        for text in texts
    ]
    tokens = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)
    if pieces and len(tokens) < context_length:
        raise LataError(f"raw text must fill at least one window of {context_length} tokens, it has {len(tokens)}")
    return tokens


def collate(rows: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Rows of different lengths as one batch, padded on the right; padding has the label -100.

    Returns:
        ``input_ids`` and ``labels`` of shape (rows, longest row); for packed rows ``position_ids``, too.
    """
    batch = {
        "input_ids": torch.nn.utils.rnn.pad_sequence([row.input_ids for row in rows], True, pad_token_id),
        "labels": torch.nn.utils.rnn.pad_sequence([row.labels for row in rows], True, IGNORED),
    }
    positions = [row.position_ids for row in rows if row.position_ids is not None]
    if positions:
        batch["position_ids"] = torch.nn.utils.rnn.pad_sequence(positions, True, 0)
    return batch


def _joined(rows: Sequence[Row]) -> Row:
    labels = torch.cat([row.labels for row in rows])
    positions = torch.cat([torch.arange(len(row.labels)) for row in rows])
    labels[positions == 0] = IGNORED
    return Row(torch.cat([row.input_ids for row in rows]), labels, positions)


def _endless_shuffle(group: range, generator: torch.Generator) -> Iterator[int]:
    while True:
        for position in torch.randperm(len(group), generator=generator).tolist():
            yield group[position]
