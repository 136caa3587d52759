"""The configurations that come with the study, and what every configuration file is read by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from lata_lightning.errors import LataError, SourceError, first_line

READY = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
"""The ready configurations by name."""


def read_yaml(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Return the file of a configuration and its keys and values.

    Args:
        path: File, or name of a ready configuration.

    Raises:
        SourceError: There is no such file, and no ready configuration of that name.
        LataError: The file is no YAML, or holds no keys and values.
    """
    file = READY.get(str(path), Path(path))
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except OSError as error:
        raise SourceError(f"{path} is no configuration file ({error.strerror}) and none of the ready ones: {', '.join(READY)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LataError(f"{file} is no YAML: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise LataError(f"{file} must hold keys and values, it holds a {type(content).__name__}")
    return file, content


def gives_checkpoints(path: str | Path) -> bool:
    """Return whether a configuration names finished checkpoints, as the published ones do, instead of saying how experts are trained.

    Errors are those of ``read_yaml``.
    """
    return "base" in read_yaml(path)[1]
