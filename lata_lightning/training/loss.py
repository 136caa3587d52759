"""The loss of a causal language model with a large vocabulary, without the logits of all positions in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from lata_lightning.evaluation.logits import body_and_head, inner_model, positions_at_once
from lata_lightning.rows.tokens import IGNORED

WIDE = 2**26
"""Above this many bytes of float32 logits the loss is computed in chunks, which costs a second run of the head."""


def is_wide(model: Any, batch: Mapping[str, Tensor]) -> bool:
    """Return whether the logits of a batch should not be in memory at once, and the loss of the model can be computed in chunks.

    Args:
        model: Hugging Face causal language model, with or without adapters of peft.
        batch: Has ``input_ids`` and ``labels``.
    """
    inside = inner_model(model)
    if inside is None or inside.loss_function is not ForCausalLMLoss or inside.config.to_dict().get("output_router_logits", False):
        return False
    return 4 * batch["input_ids"].numel() * int(inside.config.get_text_config().vocab_size) > WIDE


def chunked_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean negative log-likelihood of the labelled tokens in nats, as the model itself computes it, a few positions at a time.

    The logits of each chunk are computed again in the backward pass instead of being stored.

    Args:
        model: A model and batch for which ``is_wide`` is true.
        batch: ``input_ids`` and ``labels`` of shape (rows, tokens), and further inputs of the model.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    head = body_and_head(model, **inputs)
    if head is None:
        whole: Tensor = model(**batch, use_cache=False).loss
        return whole
    logits = head.logits
    wanted = batch["labels"][:, 1:]
    rows, positions = (wanted != IGNORED).nonzero(as_tuple=True)
    hidden, targets = head.hidden[rows, positions], wanted[rows, positions]

    def part(states: Tensor, tokens: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits(states).float(), tokens, reduction="sum")

    size = positions_at_once(head.vocabulary)
    chunks = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    total = torch.stack([checkpoint(part, states, tokens, use_reentrant=False) for states, tokens in chunks]).sum()
    return total / len(targets)
