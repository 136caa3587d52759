"""The files of the head of a classifier, which are saved next to the task vector of its encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lata_lightning.errors import CorruptFileError, LataError, SourceError, first_three
from lata_lightning.store.directories import read_object
from lata_lightning.store.file_source import open_safetensors
from lata_lightning.store.hashing import hash_stored
from lata_lightning.store.seal import check_seal, sealed
from lata_lightning.store.writer import PARTIAL_MARK

HEAD_TENSORS, HEAD_NAME = "head.safetensors", "head.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Head:
    """What a classifier adds to its encoder: tensors that belong to one task, and the names of its classes.

    Attributes:
        tensors: By their names in a checkpoint of the classifier.
        model_type: Family of the encoder, as in its config.json.
        architecture: Class of transformers that the classifier is of.
        count: Number of classes.
        labels: Name of each class, in the order of their numbers; None where the classes have numbers only.
        start: Where the weights lay that the training started from; None if that is unknown.
    """

    tensors: Mapping[str, Tensor]
    model_type: str
    architecture: str
    count: int
    labels: tuple[str, ...] | None = None
    start: str | None = None

    def save(self, directory: Path) -> None:
        """Write ``head.safetensors`` and ``head.json``, each completely or not at all; older files of these names are replaced."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        entries = {
            name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "hash": hash_stored(tensor)}
            for name, tensor in tensors.items()
        }
        data: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "model_type": self.model_type,
            "architecture": self.architecture,
            "num_labels": self.count,
            "labels": None if self.labels is None else list(self.labels),
            "modules": sorted({name.rpartition(".")[0] or name for name in tensors}),
            "start": self.start,
            "tensors": entries,
        }
        partial = [directory / f".{name}{PARTIAL_MARK}new" for name in (HEAD_TENSORS, HEAD_NAME)]
        save_file(tensors, partial[0], metadata={"format": "pt"})
        partial[1].write_text(sealed(data), "utf-8")
        for file, name in zip(partial, (HEAD_TENSORS, HEAD_NAME), strict=True):
            file.replace(directory / name)

    @classmethod
    def open(cls, path: str | Path) -> Head:
        """Return the head in a directory.

        Raises:
            SourceError: There is none, or it is of a later format.
            CorruptFileError: A file is damaged, or the two do not belong together.
        """
        directory = Path(path)
        missing = [name for name in (HEAD_TENSORS, HEAD_NAME) if not (directory / name).is_file()]
        if missing:
            raise SourceError(
                f"{directory} must hold a head, {HEAD_TENSORS} and {HEAD_NAME}; it lacks {' and '.join(missing)}. Name the folder in which a fine-tune "
                "with a new head saved them next to its task vector, such as RUN/lata."
            )
        data = read_object(directory / HEAD_NAME)
        if int(data.get("format_version", 0)) > FORMAT_VERSION:
            raise SourceError(
                f"{directory / HEAD_NAME} is of version {data['format_version']}, this release reads up to {FORMAT_VERSION}. Upgrade it."
            )
        check_seal((directory / HEAD_NAME).read_text("utf-8"), directory / HEAD_NAME)
        stored = open_safetensors([directory / HEAD_TENSORS], directory)
        tensors = {name: stored.read(name) for name in stored.names}
        try:
            expected = {name: entry["hash"] for name, entry in data["tensors"].items()}
            labels = None if data["labels"] is None else tuple(map(str, data["labels"]))
            head = cls(tensors, str(data["model_type"]), str(data["architecture"]), int(data["num_labels"]), labels, data["start"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptFileError(f"{directory / HEAD_NAME} describes no head ({error!r}). Copy it again.") from error
        wrong = {name for name in {*tensors, *expected} if name not in tensors or expected.get(name) != hash_stored(tensors[name])}
        if wrong:
            raise CorruptFileError(
                f"{HEAD_TENSORS} and {HEAD_NAME} in {directory} must belong together; other than described are {first_three(wrong)}. Copy both again."
            )
        return head

    def check_model(self, model_type: str, label: str) -> None:
        """Refuse an encoder of another family.

        Raises:
            LataError: The family is another one.
        """
        if model_type != self.model_type:
            raise LataError(
                f"the head of a {self.model_type} model does not fit {label}, which is a {model_type} model. Give the head of its own task."
            )
