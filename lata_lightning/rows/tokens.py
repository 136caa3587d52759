"""Turning conversations and texts into tokens; no other module calls a tokenizer for that.

A conversation becomes what the chat template renders, with BOS if the template has one. A text gets the special tokens that the tokenizer adds to a
text by default, such as BOS. Neither gets BOS twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor

from lata_lightning.errors import LataError, first_three
from lata_lightning.rows.schema import Sample, pair

IGNORED = -100
Template = Literal["chat", "plain"]


class TokenRow(NamedTuple):
    """One sequence: token ids, and labels that are -100 where no loss is computed; both int64 of shape (tokens,).

    Several sequences packed into one row have ``position_ids`` of the same shape, which restart at 0 with each sequence.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the token ids that a tokenizer adds before and after a text by default, such as BOS; empty lists where it adds none.

    Raises:
        LataError: The tokens of the text change when special tokens are added.
    """
    whole, content = (tokenizer("a", **more)["input_ids"] for more in ({}, {"add_special_tokens": False}))
    for begin in range(len(whole) - len(content) + 1):
        if whole[begin : begin + len(content)] == content:
            return list(whole[:begin]), list(whole[begin + len(content) :])
    raise LataError(
        f"the tokenizer {tokenizer.name_or_path!r} changes the tokens of a text when it adds its special tokens; give another tokenizer"
    )


def text_windows(tokenizer: Any, text: str, context_length: int, *, end: bool = False, max_tokens: int | None = None) -> list[list[int]]:
    """Cut a text into windows of token ids, each beginning with the special tokens that the tokenizer puts before a text.

    Args:
        tokenizer: Hugging Face tokenizer.
        text: One document.
        context_length: Most tokens of a window, at least 2.
        end: Append the end token to the text, unless the tokenizer itself does. A last window with nothing else is left out, as it predicts nothing
            of the text.
        max_tokens: Use only the first so many tokens of the text.

    Returns:
        The tokens of the text in order, in windows that do not overlap; only the last one may be shorter. The window of a text that fits equals
        ``tokenizer(text)``. A text without tokens has no window.

    Raises:
        LataError: The special tokens fill the whole window.
    """
    before, after = special_tokens(tokenizer)
    # Not verbose: the tokenizer would warn of a text longer than the model's context, although its windows are not.
    content = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    if end and tokenizer.eos_token_id not in after:
        after = [*after, tokenizer.eos_token_id]
    size = context_length - len(before)
    if size < 1:
        raise LataError(f"a window of {context_length} tokens is filled by the {len(before)} that the tokenizer puts first; make it longer")
    tokens = [*content, *after] if content else []
    begins = range(0, len(tokens) - 1 if end else len(tokens), size)
    return [[*before, *tokens[begin : begin + size]] for begin in begins]


def conversation_segments(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]] | None:
    """Render a conversation with the chat template, and cut it where the learned text begins and ends.

    Args:
        tokenizer: Hugging Face tokenizer with a chat template.
        messages: Turns with ``role`` and ``content``; turns after the assistant's last one are left out.

    Returns:
        Segments of text and whether they are learned: every turn of the assistant, with what the template puts after it. None where the template
        renders the beginning of a conversation differently when more turns follow.

    Raises:
        LataError: The template refuses the conversation, or no turn is the assistant's.
    """
    segments: list[tuple[str, bool]] = []
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
        segments += [(question[len(done) :], False), (answered[len(question) :], True)]
        done = answered
    if not segments:
        begins = str(messages[0]["content"])[:40] if messages else ""
        raise LataError(f"every conversation needs a turn of the assistant to learn; there is none in the one that begins {begins!r}")
    return segments


def conversation_row(tokenizer: Any, sample: Sample, where: str, template: Template = "chat") -> TokenRow:
    """Turn a conversation or a pair into tokens, labelled from each answer's first token to the end of the turn.

    Args:
        tokenizer: Hugging Face tokenizer, with a chat template unless ``template`` is ``plain``.
        sample: A conversation or a pair.
        where: Which row it is, for messages.
        template: ``plain`` puts the answer of a pair directly after its prompt, the end token after both, and the tokenizer's special tokens before
            them.

    Raises:
        LataError: The tokenizer has no chat template, the template refuses the conversation or renders its beginning differently when more turns
            follow, no turn is the assistant's, or a plain row is not a pair.
    """
    if template == "plain":
        if sample.form != "pair":
            raise LataError(f"the template 'plain' joins a prompt and its answer; {where} holds a conversation. Use the template 'chat'.")
        row = row_of(tokenizer, [(sample.prompt, False), (sample.answer + tokenizer.eos_token, True)])
        before = torch.tensor(special_tokens(tokenizer)[0], dtype=torch.long)
        return TokenRow(torch.cat([before, row.input_ids]), torch.cat([torch.full_like(before, IGNORED), row.labels]))
    check_chat_template(tokenizer)
    segments = conversation_segments(tokenizer, sample.messages)
    if segments is None:
        raise LataError(
            f"the chat template renders the conversation in {where} differently once it goes on, so that what to learn is not known; "
            "give one question and answer a row"
        )
    return row_of(tokenizer, segments)


def check_chat_template(tokenizer: Any) -> None:
    """Raise a LataError for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise LataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, which conversations and pairs are put into. Copy chat_template.jinja of the "
            "instruct model into its directory, take pairs with the template 'plain', or give rows with a 'text'."
        )


def chat_rows(tokenizer: Any, pairs: Sequence[tuple[str, str]], longest: int) -> list[TokenRow]:
    """Turn pairs into tokens in the tokenizer's chat format, labelled from the answer's first token to the end of the turn.

    Args:
        tokenizer: Hugging Face tokenizer with a chat template.
        pairs: (prompt, answer) pairs.
        longest: Most tokens a row may have.

    Raises:
        LataError: A row is longer than that, or the template renders a question differently when an answer follows.
    """
    rows = [conversation_row(tokenizer, pair(*one), f"pair {number}") for number, one in enumerate(pairs, start=1)]
    too_long = [prompt for (prompt, _), row in zip(pairs, rows, strict=True) if len(row.input_ids) > longest]
    if too_long:
        raise LataError(f"rows may have at most {longest} tokens; too long are {first_three(too_long)}")
    return rows


def row_of(tokenizer: Any, segments: Iterable[tuple[str, bool]]) -> TokenRow:
    """Turn segments of text into one row, labelled where they are learned; special tokens are only those in the text.

    No token spans two segments, as in generation.
    """
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in segments:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += tokens
        labels += tokens if learned else [IGNORED] * len(tokens)
    return TokenRow(torch.tensor(ids, dtype=torch.long), torch.tensor(labels, dtype=torch.long))


def packed(rows: Iterable[TokenRow], context_length: int) -> Iterator[TokenRow]:
    """Pack rows, in their order, into as few longer rows as possible; no row is cut.

    ``position_ids`` restart at 0 with every row, which tells the models of transformers not to attend across the border. The first token of a row is not
    learned, as no token before it predicts it.

    Args:
        rows: At most ``context_length`` tokens each.
        context_length: Most tokens of a packed row.
    """
    open_rows: list[TokenRow] = []
    for row in rows:
        if open_rows and sum(len(other.input_ids) for other in open_rows) + len(row.input_ids) > context_length:
            yield _joined(open_rows)
            open_rows = []
        open_rows.append(row)
    if open_rows:
        yield _joined(open_rows)


def raw_tokens(tokenizer: Any, texts: Iterable[str], context_length: int) -> Tensor:
    """Return all texts as one sequence of tokens, each between the tokenizer's special tokens and the end token.

    Returns:
        int32 of shape (tokens,), empty without texts.

    Raises:
        LataError: There are texts, but together they do not fill one window of ``context_length`` tokens.
    """
    before, after = special_tokens(tokenizer)
    after = after if tokenizer.eos_token_id in after else [*after, tokenizer.eos_token_id]
    segments = [
        # Not verbose, as in text_windows.
        torch.tensor([*before, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *after], dtype=torch.int32)
        for text in texts
    ]
    tokens = torch.cat(segments) if segments else torch.empty(0, dtype=torch.int32)
    if segments and len(tokens) < context_length:
        raise LataError(f"raw text must fill at least one window of {context_length} tokens, it has {len(tokens)}")
    return tokens


def collate(rows: Sequence[TokenRow], pad_token_id: int) -> dict[str, Tensor]:
    """Return rows of different lengths as one batch, padded on the right; padding has the label -100.

    Returns:
        ``input_ids`` and ``labels`` of shape (rows, longest row); ``position_ids`` too for packed rows.
    """
    batch = {
        "input_ids": torch.nn.utils.rnn.pad_sequence([row.input_ids for row in rows], True, pad_token_id),
        "labels": torch.nn.utils.rnn.pad_sequence([row.labels for row in rows], True, IGNORED),
    }
    positions = [row.position_ids for row in rows if row.position_ids is not None]
    if positions:
        batch["position_ids"] = torch.nn.utils.rnn.pad_sequence(positions, True, 0)
    return batch


def _joined(rows: Sequence[TokenRow]) -> TokenRow:
    labels = torch.cat([row.labels for row in rows])
    positions = torch.cat([torch.arange(len(row.labels)) for row in rows])
    labels[positions == 0] = IGNORED
    return TokenRow(torch.cat([row.input_ids for row in rows]), labels, positions)
