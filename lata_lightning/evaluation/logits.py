"""Logits of selected positions, a few at a time, so that the logits of all positions are never in memory at once where the model allows it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

BYTES_AT_ONCE = 2**25
"""Bytes of float32 logits that are in memory at once; always enough for one position."""


class BodyOutput(NamedTuple):
    """Output of the body of a causal language model, and the head that turns it into logits.

    Attributes:
        hidden: Output of the body, of shape (rows, tokens, width).
        logits: Turns hidden states of shape (positions, width) into logits of shape (positions, vocabulary) by the model's own code, including soft
            caps, scales and biases.
        vocabulary: Number of logits of one position.
    """

    hidden: Tensor
    logits: Callable[[Tensor], Tensor]
    vocabulary: int


class TokenScores(NamedTuple):
    """Likelihoods of the labelled tokens of a batch, row by row.

    Attributes:
        rows: Number of the row of each token, int64 of shape (tokens,).
        losses: Negative log-likelihood in nats, float64 of shape (tokens,).
        hits: Whether the token was the most likely one, bool of shape (tokens,).
    """

    rows: Tensor
    losses: Tensor
    hits: Tensor


def token_scores(model: Any, input_ids: Tensor, labels: Tensor) -> TokenScores:
    """Score the labelled tokens of a batch, each predicted from the tokens before it.

    Args:
        model: Hugging Face causal language model in evaluation mode, or a module with an output ``logits``.
        input_ids: Shape (rows, tokens), padded on the right.
        labels: The same shape; -100 where nothing is predicted. The first token of a row is never predicted.

    Returns:
        The scores; losses are computed in float32, whatever the precision of the model.
    """
    wanted = labels[:, 1:]
    rows, positions = (wanted != -100).nonzero(as_tuple=True)
    targets = wanted[rows, positions]
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    for begin, logits in selected_logits(model, input_ids, rows, positions):
        part = targets[begin : begin + len(logits)]
        losses.append(nn.functional.cross_entropy(logits.float(), part, reduction="none").double())
        hits.append(logits.argmax(-1) == part)
    return TokenScores(rows, torch.cat(losses) if losses else torch.empty(0).double(), torch.cat(hits) if hits else torch.empty(0).bool())


def selected_logits(model: Any, input_ids: Tensor, rows: Tensor, positions: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the logits at some positions of a batch, chunk by chunk.

    Args:
        model: Hugging Face causal language model, or a module with an output ``logits``.
        input_ids: Shape (rows, tokens).
        rows: Number of the row of each position, int64 of shape (count,).
        positions: Index within the row, of the same shape.

    Yields:
        Number of the first position of the chunk, and logits of shape (positions of the chunk, vocabulary).
    """
    head = body_and_head(model, input_ids=input_ids)
    if head is None:
        logits = model(input_ids=input_ids, use_cache=False).logits
        size = positions_at_once(logits.shape[-1])
        for begin in range(0, len(rows), size):
            yield begin, logits[rows[begin : begin + size], positions[begin : begin + size]]
        return
    hidden = head.hidden[rows, positions]
    size = positions_at_once(head.vocabulary)
    for begin in range(0, len(hidden), size):
        yield begin, head.logits(hidden[begin : begin + size])


def positions_at_once(vocabulary: int) -> int:
    """Return how many positions have float32 logits that fit into ``BYTES_AT_ONCE``; at least 1."""
    return max(1, BYTES_AT_ONCE // (4 * vocabulary))


def body_and_head(model: Any, **inputs: Any) -> BodyOutput | None:
    """Run the body of a causal language model, and return its output with the head that follows.

    Args:
        model: Any module.
        inputs: Inputs of the model, without labels.

    Returns:
        None unless this is a transformers model whose forward pass is its ``base_model`` and then a head; other models must run as a whole.
    """
    whole = inner_model(model)
    if whole is None:
        return None
    body = whole.base_model
    outputs: list[Any] = []
    handle = body.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        # The model always returns logits, so one position goes through the head here; the others follow chunk by chunk.
        whole(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    given: Any = outputs[0] if len(outputs) == 1 else None
    hidden = given.get("last_hidden_state") if isinstance(given, Mapping) else None
    if hidden is None or hidden.shape[:2] != inputs["input_ids"].shape:
        return None
    dummy = inputs["input_ids"][:1, :1]

    answer: Any = type(given)

    def logits(states: Tensor) -> Tensor:
        with _answering(body, answer(last_hidden_state=states[None])):
            logits_of_states: Tensor = whole(input_ids=dummy, use_cache=False).logits[0]
        return logits_of_states

    return BodyOutput(hidden, logits, int(whole.config.get_text_config().vocab_size))


def inner_model(model: Any) -> Any:
    """Return the transformers causal language model inside a module if it can compute the logits of some positions only, else None.

    For a model wrapped by peft with LoRA or similar adapters, this is the wrapped model, whose layers have the adapters.
    """
    transformers, peft = sys.modules.get("transformers"), sys.modules.get("peft")
    # A module cannot come from a library that was never imported.
    if peft is not None and isinstance(model, peft.PeftModel) and not model.active_peft_config.is_prompt_learning:
        model = model.get_base_model()
    if transformers is None or not isinstance(model, transformers.PreTrainedModel) or model.base_model is model:
        return None
    return model if "logits_to_keep" in inspect.signature(model.forward).parameters and model.get_output_embeddings() is not None else None


@contextmanager
def _answering(body: nn.Module, answer: Any) -> Iterator[None]:
    """Make a module return a given output instead of running."""
    own = vars(body).get("forward")
    body.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        del body.forward
        if own is not None:
            body.forward = own
