"""Warnings about an adapter: that it is large, or has lost much of the vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lata_lightning.errors import first_three

ENOUGH = 0.99
"""Share of the squared norm of a matrix that a suggested rank keeps, so that the relative error is a tenth."""
_LOST = 0.1


def loss_remark(record: Mapping[str, Any], ranks: Mapping[str, int]) -> str | None:
    """Return a sentence that says how much an adapter lost, and which rank would be enough; None if it lost less than a tenth of the norm.

    Args:
        record: The result of ``reconstruction``.
        ranks: For each truncated tensor, the smallest rank that keeps ``ENOUGH`` of its squared norm.
    """
    lost = record["all"]
    if lost is None or lost <= _LOST or not ranks:
        return None
    truncation = f"rank {record['rank']}" if record["energy"] is None else f"{record['energy']:.3g} of the squared norm"
    return (
        f"at {truncation} the adapter loses {lost:.0%} of the norm of the vectors: they are of no low rank. To lose about a tenth, --energy {ENOUGH} "
        f"needs ranks up to {max(ranks.values())}; a merged model (--to hf) loses nothing"
    )


def size_remark(size: int, model_size: int, whole: Mapping[str, int]) -> str | None:
    """Return a sentence that says that an adapter is large; None if it is at most half as large as the model.

    Args:
        size: Bytes of the adapter.
        model_size: Bytes of the start model.
        whole: Bytes of each module that is stored whole.
    """
    if size <= model_size / 2:
        return None
    large = sorted(whole, key=lambda path: -whole[path])
    leave_out = " Leave modules out that you can do without (--leave-out, as for embeddings), or consider" if whole else " Consider"
    modules = f", {_gigabytes(sum(whole.values()))} of it for modules that are stored whole, {first_three(large)}" if whole else ""
    return f"the adapter takes {_gigabytes(size)}{modules}; the model itself takes {_gigabytes(model_size)}.{leave_out} a merged model (--to hf)"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
