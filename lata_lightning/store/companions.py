"""The other files of a model directory: which are copied to a model made from it, and which are not."""

from __future__ import annotations

import filecmp
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lata_lightning.errors import LataError, first_three
from lata_lightning.store.descriptors import unreadable
from lata_lightning.store.directories import ADAPTER_CONFIG, MANIFEST_NAME, MERGE_RECORD
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.tokens import tokenizer_files
from lata_lightning.store.weight_files import weight_files

_SHOWN = 20
# Weights in any format, and the state of a training run; at the top of a directory.
_STATES = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|onnx|onnx_data|h5|msgpack|ot|tflite|npz|pkl|pickle|distcp|data-\d+-of-\d+)$|\.index(\.json)?$|"
    r"^trainer_state\.json$"
)
# The same model in the formats of other tools, also in folders, whose parts may have weights of their own.
_OTHER_FORMATS = re.compile(r"\.(gguf|ggml|onnx|onnx_data|h5|msgpack|ot|tflite|distcp)$")
_FOLDERS = re.compile(
    r"^(onnx|openvino|coreml|gguf|original|tf|flax|runs|logs|wandb|__pycache__|checkpoint-\d+|global_step\d+|.*\.mlpackage)$"
)
# Modules that come after the model, as the dense layers of sentence-transformers.
_MODULE_WEIGHTS = re.compile(r"/[^/]+\.(safetensors|bin|pt|pth)$")
_OWN = ("README.md", MANIFEST_NAME, MERGE_RECORD)


@dataclass(frozen=True)
class Companions:
    """The files that are copied along with weights, decided before anything is written.

    Attributes:
        copied: Files by their path in the new directory.
        left_out: Paths that are not copied, folders with a slash at their end; without the weights themselves.
        label: Name of the weights, for the note.
    """

    copied: Mapping[str, Path]
    left_out: tuple[str, ...]
    label: str

    @property
    def size(self) -> int:
        """Bytes of the files that are copied."""
        return sum(file.stat().st_size for file in self.copied.values())

    @property
    def note(self) -> str | None:
        """A sentence about what is not copied; None if everything is."""
        if not self.left_out:
            return None
        more = len(self.left_out) - _SHOWN
        shown = ", ".join(self.left_out[:_SHOWN])
        return f"not copied from {self.label}: {shown}{f' and {more} more, which merge.json lists' if more > 0 else ''}"

    def copy_to(self, directory: Path) -> None:
        """Copy the files; links become files."""
        for name, file in self.copied.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, directory / name)


def companions_of(source: TensorSource, tokenizer: TensorSource | None = None) -> Companions:
    """Return the files to copy along with weights: all of their directory but weights and the state of tools.

    Links are followed to files of the directory itself and of the hub's cache only.

    Args:
        source: The weights; nothing is copied if they are not in a model directory.
        tokenizer: The model whose tokenizer files replace those of the source.

    Raises:
        SourceError: A file cannot be read.
    """
    if source.directory is None:
        return Companions({}, (), source.label)
    directory = source.directory
    own = _weights(directory, source)
    taken = None if tokenizer is None or tokenizer.directory == directory else tokenizer.directory
    replaced = set() if taken is None else set(tokenizer_files(directory))
    copied: dict[str, Path] = {}
    left_out: list[str] = []
    for name, file in _files_below(directory, ""):
        if file in own or file in replaced:
            continue
        if file.is_dir() or _is_not_copied(name, file, directory):
            left_out.append(f"{name}/" if file.is_dir() else name)
        else:
            copied[name] = file
    if taken is not None:
        copied |= {file.name: file for file in tokenizer_files(taken)}
    for file in copied.values():
        try:
            with file.open("rb"):
                pass
        except OSError as error:
            raise unreadable(file, error) from error
    return Companions(copied, tuple(left_out), source.label)


def note_on_modules(start: Path | None, tuned: Path | None, label: str, advice: str) -> str | None:
    """Return a sentence about weights in folders that a tuned model has and its start lacks, or has with other bytes; None if there are none.

    Args:
        start: Directory of the start, or of the model that is added to; None where there is none.
        tuned: Directory of the tuned model; None where there is none.
        label: Name of the tuned model.
        advice: What happens to them.

    Raises:
        SourceError: A file cannot be read.
    """
    if start is None or tuned is None or start == tuned:
        return None
    inside = [
        (name, file) for name, file in _files_below(tuned, "") if _MODULE_WEIGHTS.search(name) and not _is_not_copied(name, file, tuned)
    ]
    try:
        others = [name for name, file in inside if not ((start / name).is_file() and filecmp.cmp(start / name, file, shallow=False))]
    except OSError as error:
        raise unreadable(tuned, error) from error
    if not others:
        return None
    return f"{label} has other weights in the folders of its directory, {first_three(others)}: {advice}"


def _files_below(directory: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """Yield every file below a directory, and every folder that is not entered, with its path from the directory."""
    for entry in sorted(directory.iterdir()):
        name = prefix + entry.name
        if entry.is_dir() and not _is_left_out(entry):
            yield from _files_below(entry, f"{name}/")
        else:
            yield name, entry


def _is_left_out(folder: Path) -> bool:
    """Return whether nothing in a folder is copied: a link, hidden, the model in another format, a training run, or a vector, merge or adapter."""
    if folder.is_symlink() or folder.name.startswith(".") or _FOLDERS.search(folder.name):
        return True
    return any((folder / name).exists() for name in (MANIFEST_NAME, MERGE_RECORD, ADAPTER_CONFIG))


def _is_not_copied(name: str, file: Path, directory: Path) -> bool:
    if name in _OWN or file.name.startswith(".") or not file.is_file():
        return True
    if (_STATES if "/" not in name else _OTHER_FORMATS).search(file.name):
        return True
    target, home = file.resolve(), directory.resolve()
    # In the hub's cache, files are links to blobs two folders above the snapshot.
    return not (target.is_relative_to(home) or (home.parent.name == "snapshots" and target.is_relative_to(home.parent.parent / "blobs")))


def _weights(directory: Path, source: TensorSource) -> set[Path]:
    """Return the files with the weights, and their index."""
    try:
        files = weight_files(directory, source.config)
    except LataError:
        # The weights are not in this directory, as for an adapter's base.
        return set()
    return {*files.paths, *((files.index_file,) if files.index_file is not None else ())}
