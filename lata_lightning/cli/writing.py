"""Shared parts of commands that write: a dry run, replacing earlier output, and uploading it to the hub."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import note, print_json
from lata_lightning.cli.shipped import as_typed
from lata_lightning.store.output_policy import DryRun, OutputPolicy

if TYPE_CHECKING:
    from lata_lightning.merging.merge import Term

_READ = (
    "onto", "target", "start_model", "tuned_model", "models", "vectors", "vector", "paths", "instruction", "coefficients", "data", "control",
    "forget", "retain", "real_authors", "world_facts", "reference", "head",
)  # fmt: skip
"""Arguments that name what a command reads, in the order in which a dry run lists them."""
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def add_writing(parser: ArgumentParser, *, overwrite: bool = True, hub: bool = False) -> None:
    """Add ``--dry-run``, and where a command has use for them ``--overwrite`` and ``--push-to-hub``."""
    parser.add_argument(
        "--dry-run", type=bool, default=False, help="Check everything, print what would be read, applied and written, and write nothing."
    )
    if overwrite:
        parser.add_argument(
            "--overwrite",
            type=bool,
            default=False,
            help="Replace earlier output of lata at the path of the output; it is removed when the new one is complete, not before.",
        )
    if hub:
        parser.add_argument(
            "--push-to-hub",
            metavar="REPO",
            type=str | None,
            help="Repository of the Hugging Face hub, such as 'name/model', to upload the finished directory to; it is made, private, if there is none.",
        )


def policy_of(options: Namespace) -> OutputPolicy:
    """Return the policy that the arguments of ``add_writing`` ask for."""
    return OutputPolicy(
        overwrite=bool(options.get("overwrite")),
        dry_run=bool(options.get("dry_run")),
        inputs=tuple(Path(path) for path in _read(options) if Path(path).exists()),
    )


@contextmanager
def applying(terms: Iterable[Term]) -> Iterator[None]:
    """Print on standard error, after the block, with which coefficients the vectors were applied; a dry run prints it with what would be written."""
    from lata_lightning.merging.weigh import applied

    terms = list(terms)
    try:
        yield
    except DryRun as stopped:
        sentences = [f"scale {term.scale:g}: {sentence}" if first else sentence for term in terms for first, sentence in _numbered(term)]
        raise DryRun(stopped.path, stopped.size, sentences, stopped.reads) from None
    for term in terms:
        for sentence in applied(term.vector):
            note(sentence)


def show_plan(options: Namespace, stopped: DryRun) -> None:
    """Print what a command would do: as JSON where the command has ``--format json``, otherwise in lines."""
    if options.get("format") == "json":
        print_json(_plan(options, stopped))
    else:
        sys.stdout.write("\n".join(_lines(_plan(options, stopped))) + "\n")


def size_in_words(size: int) -> str:
    """Format a number of bytes with a unit."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} bytes"


def _numbered(term: Term) -> list[tuple[bool, str]]:
    from lata_lightning.merging.weigh import applied

    return [(number == 0, sentence) for number, sentence in enumerate(applied(term.vector))]


def _plan(options: Namespace, stopped: DryRun) -> dict[str, Any]:
    reads = {**_read(options), **_described(stopped.reads)}
    replaced = stopped.path.is_file() or (stopped.path.is_dir() and any(stopped.path.iterdir()))
    return {
        "dry_run": True,
        "reads": [{"path": as_typed(path), "holds": kind} for path, kind in reads.items()],
        "applies": list(stopped.applied),
        "writes": {"path": str(stopped.path), "bytes": stopped.size, "replaces": replaced},
        "uploads_to": options.get("push_to_hub"),
    }


def _lines(plan: Mapping[str, Any]) -> Iterator[str]:
    writes = plan["writes"]
    size = "" if writes["bytes"] is None else f", {size_in_words(writes['bytes'])}"
    entries = {
        "reads": [f"{entry['path']} ({entry['holds']})" for entry in plan["reads"]],
        "applies": plan["applies"],
        "writes": [f"{writes['path']}{size}{', in the place of what is there' if writes['replaces'] else ''}"],
        "uploads": [] if plan["uploads_to"] is None else [f"{writes['path']} to {plan['uploads_to']}"],
        "refuses": ["nothing: every check passed"],
    }
    for title, lines in entries.items():
        for number, line in enumerate(lines):
            yield f"{title if number == 0 else '':<9}{line}"
    yield "This was a dry run: nothing was written."


def _read(options: Namespace) -> dict[str, str]:
    """Return what a command reads: a description by path."""
    given = [options.get(key) for key in _READ]
    return _described(path for value in given for path in (value if isinstance(value, list) else [value]) if isinstance(path, str))


def _described(paths: Iterable[str]) -> dict[str, str]:
    from lata_lightning.store.directories import holds_adapter, holds_vector

    kinds: dict[str, str] = {}
    for path in paths:
        kind = "vector" if holds_vector(path) else "adapter" if holds_adapter(path) else "directory" if Path(path).is_dir() else "file"
        kinds[path] = kind if Path(path).exists() else "from the hub"
    return kinds
