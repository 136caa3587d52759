"""Loading a model and its tokenizer for the commands that run one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.errors import LataError, SourceError
from lata_lightning.store.dtypes import FloatName

if TYPE_CHECKING:
    from lata_lightning.store.head_files import Head


def add_loading(parser: ArgumentParser) -> None:
    """Add ``--dtype``, ``--autocast`` and ``--device``."""
    parser.add_argument(
        "--dtype",
        type=FloatName,
        default="float32",
        help="Precision to hold and run the model in. Scores are computed in float32 in any case.",
    )
    parser.add_argument(
        "--autocast",
        type=Literal["bfloat16", "float16"] | None,
        help="Run matrix products in this precision and everything else in that of --dtype: faster, and less precise.",
    )
    parser.add_argument("--device", type=str | None, help="Device to run it on, such as cuda:0; by default a GPU if there is one.")


def add_rows(parser: ArgumentParser) -> None:
    """Add ``--context-length`` and ``--template``, which say how rows become tokens."""
    parser.add_argument("--context-length", type=int, default=128, help="For the perplexity of text: most tokens of a window.")
    add_template(parser)


def add_head(parser: ArgumentParser) -> None:
    """Add ``--head``, for classification heads that were saved beside task vectors."""
    parser.add_argument(
        "--head",
        metavar="RUN",
        nargs="+",
        default=[],
        help="For texts with labels: folder of a fine-tune with head.safetensors and head.json, such as RUN/lata; one for all files, or one for each "
        "in their order.",
    )


def heads_of(options: Namespace, paths: Sequence[str], metrics: Iterable[str]) -> dict[str, Head]:
    """Return the head for each file of data; none if ``--head`` is not given.

    Args:
        options: With ``head``.
        paths: The files.
        metrics: What is measured on them.

    Raises:
        LataError: There is another number of heads than of files, or what is measured needs no head.
        SourceError, CorruptFileError: A head cannot be read.
    """
    from lata_lightning.store.head_files import Head

    if not options.head:
        return {}
    other = sorted(set(metrics) - {"accuracy"})
    if other:
        raise LataError(f"--head is for the accuracy of texts with labels; the data asks for {', '.join(other)}. Leave it out.")
    if len(options.head) not in (1, len(paths)):
        raise LataError(
            f"give one head for all files of data, or one for each in their order; got {len(options.head)} heads for {len(paths)} files"
        )
    opened = {path: Head.open(path) for path in dict.fromkeys(options.head)}
    given = options.head * len(paths) if len(options.head) == 1 else options.head
    found: dict[str, Head] = {}
    for path, head in zip(paths, given, strict=True):
        if found.setdefault(path, opened[head]) is not opened[head]:
            raise LataError(f"{path} is given twice with different heads; score it once with each")
    return found


def add_template(parser: ArgumentParser) -> None:
    """Add ``--template``."""
    parser.add_argument(
        "--template",
        type=Literal["chat", "plain"],
        default="chat",
        help="Form of questions and answers: the tokenizer's chat template, or 'plain', the answer straight after the prompt.",
    )


def load(options: Namespace, path: str, *, classifier: bool = False, heads: Sequence[Head] = ()) -> tuple[Any, Any]:
    """Load a model in evaluation mode, and its tokenizer.

    Args:
        options: With ``dtype`` and ``device``; without a device, a GPU if there is one.
        path: Hugging Face directory or hub id.
        classifier: Load a model for sequence classification instead of a causal language model.
        heads: Heads to score the classifier with; by default the one that is stored with it.

    Raises:
        SourceError: Either cannot be loaded, or there is no such device.
        CorruptFileError: A file is damaged.
        LataError: A classifier lacks its head, or a given one does not fit.
    """
    import torch

    from lata_lightning.store.opening import open_source
    from lata_lightning.training.loading import load_causal_lm, load_classifier, load_tokenizer

    # Damaged and missing files are named by this better than by transformers.
    open_source(path)
    with _without_bars():
        model = load_classifier(path, options.dtype, heads) if classifier else load_causal_lm(path, options.dtype)
    try:
        return model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), load_tokenizer(path)
    except (RuntimeError, AssertionError) as error:
        raise SourceError(f"the model cannot be put on the device {options.device!r}: {str(error).partition(chr(10))[0]}") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Show no progress bars of transformers, which would stand between the lines of a command."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def running(options: Namespace, model: Any) -> Iterator[None]:
    """Run a model under the precision that ``--autocast`` names."""
    import torch

    device = next(model.parameters()).device.type
    dtype = None if options.autocast is None else getattr(torch, options.autocast)
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        yield
