"""Removing the padding of a batch from the inputs and outputs of modules."""

from __future__ import annotations

import torch
from torch import Tensor

from lata_lightning.errors import LataError
from lata_lightning.linearity.matrices import MatrixUse, flattened
from lata_lightning.linearity.samples import Batch


def hidden_positions(hidden: Tensor, batch: Batch, path: str) -> Tensor:
    """Return hidden states as (positions, width), without padding.

    Args:
        hidden: Hidden states of a batch.
        batch: The batch. Positions where ``attention_mask`` (in a decoder of an encoder-decoder model, ``decoder_attention_mask``) is 0 are padding.
        path: Path of the module that the hidden states come from.

    Raises:
        LataError: There is padding, and the hidden states do not have the shape (rows, positions, width).
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    decoding = "decoder_input_ids" in batch and "decoder" in path.split(".")
    mask = batch.get("decoder_attention_mask" if decoding else "attention_mask")
    if mask is None or bool(mask.all()):
        return flat
    if hidden.shape[:-1] not in (mask.shape, (mask.numel(),)):
        raise LataError(
            f"{path} gives out hidden states of shape {tuple(hidden.shape)}, in which the padding of a batch of shape {tuple(mask.shape)} cannot be "
            "found. Give batches without padding."
        )
    return flat[mask.bool().reshape(-1)]


def input_positions(path: str, batch: Batch, inputs: Tensor, role: MatrixUse) -> Tensor:
    """Return inputs of a matrix as (positions, width), or row numbers of a table as (positions,), without padding.

    Args:
        path: Path of the module that the matrix belongs to.
        batch: The batch.
        inputs: The inputs.
        role: How the matrix is used.

    Raises:
        LataError: There is padding in the batch, and the inputs do not have the shape (rows, positions, width).
    """
    flat = flattened(inputs, role)
    masks = [batch["attention_mask"]] if "attention_mask" in batch else []
    if "decoder_input_ids" in batch:
        decoding = batch.get("decoder_attention_mask", torch.ones_like(batch["decoder_input_ids"]))
        steps = path.split(".")
        # The encoder comes first, so it is the first to look tokens up in a table outside both.
        first = "encoder" in steps or (role == "table" and "decoder" not in steps)
        masks = [*masks, decoding] if first else [decoding, *masks]
    if all(mask.all() for mask in masks):
        return flat
    shape = inputs.shape if role == "table" else inputs.shape[:-1]
    for mask in masks:
        if shape in (mask.shape, (mask.numel(),)):
            return flat[mask.reshape(-1).bool()]
    # Position embeddings and the like are looked up once for all rows, and a pooled row has no padding.
    if role == "table" or shape == masks[0].shape[:1]:
        return flat
    raise LataError(
        f"a linear layer of {path} takes in inputs of shape {tuple(inputs.shape)}, in which the padding of a batch of shape {tuple(masks[0].shape)} "
        "cannot be found. Give batches without padding, such as batches of one row."
    )
