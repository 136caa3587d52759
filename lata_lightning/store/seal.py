"""JSON files with a hash of themselves, so that a later edit is noticed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from blake3 import blake3

from lata_lightning.errors import CorruptFileError

SEAL = "self_hash"
_BLANK = "blake3:" + 64 * "0"


def sealed(data: Mapping[str, Any]) -> str:
    """Return the JSON text of an object, with a hash of that text as its last entry.

    The hash is the BLAKE3 of the UTF-8 text in which its own 64 digits are zeros.

    Raises:
        ValueError: A number is not finite.
    """
    text = json.dumps({**data, SEAL: _BLANK}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    before, _, after = text.rpartition(_BLANK)
    return f"{before}{_hash(text)}{after}"


def check_seal(text: str, label: object) -> None:
    """Refuse a text that is not what ``sealed`` wrote.

    Args:
        text: Content of the file.
        label: Its name, for messages.

    Raises:
        CorruptFileError: The text was edited, or has no hash of itself.
    """
    stated = json.loads(text).get(SEAL)
    if not isinstance(stated, str) or stated not in text:
        raise CorruptFileError(f"{label} holds no hash of itself ({SEAL}), so nothing tells whether it was edited. Copy it again.")
    before, _, after = text.rpartition(stated)
    if _hash(f"{before}{_BLANK}{after}") != stated:
        raise CorruptFileError(
            f"{label} was edited after it was written: its content does not match the hash in its {SEAL}. Copy it again from where it was whole, or "
            "make it again."
        )


def _hash(text: str) -> str:
    return "blake3:" + blake3(text.encode()).hexdigest()
