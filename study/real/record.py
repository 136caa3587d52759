"""What has been computed, in one JSON file: a run that is broken off anywhere goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lata_lightning.store.writer import write_json


class Record:
    """Values by key, of which each is written to the file as soon as it is known.

    Args:
        path: The file; what it holds about something else is forgotten.
        about: What all values depend on, as plain types for JSON.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self._about = path, json.loads(json.dumps(about))
        content: Any = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        self._values: dict[str, Any] = content["values"] if content.get("about") == self._about else {}

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __call__(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return the value of a key, which is computed and written if it is not known; always as JSON gives it back."""
        if key not in self._values:
            self._values[key] = json.loads(json.dumps(compute(), allow_nan=False))
            replace_json(self.path, {"about": self._about, "values": self._values})
        return self._values[key]


def replace_json(path: Path, data: Any) -> None:
    """Write a JSON file under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    write_json(partial, data)
    partial.replace(path)
