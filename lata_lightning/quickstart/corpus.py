"""Raw text for the quickstart: two shipped files, and the standard library of the running Python for pre-training.

The shipped files are unmodified modules of Python 3.11's standard library (licence in ``text/LICENSE-PYTHON.txt``): ``contextlib``, ``enum``,
``json.decoder``, ``pathlib`` and ``random`` in ``replay.txt``. Those in ``held_out.txt`` are never trained on: they measure how well a model still
predicts raw text.
"""

from __future__ import annotations

import os
from pathlib import Path

from lata_lightning.errors import LataError

HELD_OUT_MODULES = ("bisect.py", "fractions.py", "heapq.py", "sched.py")
# Not typical Python (tables, generated files, translations of other code), or not part of the library itself.
SKIPPED_FOLDERS = frozenset(
    (
        "__pycache__",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    )
)
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "_pydecimal")


def replay_text() -> str:
    """Return about 200 KB of raw text to mix into fine-tuning, so that a model does not forget to predict text."""
    return _shipped("replay.txt")


def held_out_text() -> str:
    """Return about 60 KB of raw text, on which no quickstart model was trained, to measure perplexity."""
    return _shipped("held_out.txt")


def standard_library_texts(folder: Path | None = None) -> list[str]:
    """Read the sources of the running Python's standard library, one text for each module.

    Args:
        folder: Folder of the library; by default that of the running Python.

    Returns:
        The ``.py`` files that are valid UTF-8, ordered by path, without tests, codec tables and the held-out modules. Another Python version has other
        texts.

    Raises:
        LataError: The folder holds no such file.
    """
    folder = Path(os.__file__).parent if folder is None else folder
    texts = []
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        skipped = SKIPPED_FOLDERS.intersection(relative.parts) or relative.parts[0].startswith(SKIPPED_PREFIXES)
        if skipped or relative.as_posix() in HELD_OUT_MODULES:
            continue
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    if not texts:
        raise LataError(f"no Python sources in {folder}; pre-training needs a Python whose standard library is plain .py files")
    return texts


def _shipped(name: str) -> str:
    return (Path(__file__).parent / "text" / name).read_text(encoding="utf-8")
