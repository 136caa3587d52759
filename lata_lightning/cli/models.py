"""Loading a model and its tokenizer for the commands that run one."""

from __future__ import annotations

from typing import Any, Literal

from jsonargparse import ArgumentParser

from lata_lightning.errors import SourceError


def add_loading(parser: ArgumentParser) -> None:
    """``--dtype`` and ``--device``."""
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16", "float16"] | None,
        help="Precision to run the model in; by default that of its files.",
    )
    parser.add_argument("--device", type=str | None, help="Device to run it on, such as cuda:0; by default a GPU if there is one.")


def load(path: str, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        path: Hugging Face directory or hub id.
        dtype: Precision; by default that of the files.
        device: Where to; by default a GPU if there is one.

    Raises:
        SourceError: Either cannot be loaded, or there is no such device.
        CorruptFileError: A file is damaged.
    """
    import torch
    from transformers import AutoTokenizer

    from lata_lightning.store.opening import open_source
    from lata_lightning.training.loading import load_causal_lm

    weights = open_source(path)
    held = next((weights.dtype(name) for name in weights.names if weights.dtype(name).is_floating_point), torch.float32)
    model = load_causal_lm(path, dtype or str(held).removeprefix("torch."))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{path} holds no tokenizer that can be loaded ({error}). Copy the tokenizer files of the start into it."
        ) from error
    try:
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise SourceError(f"the model cannot be put on the device {device!r}: {str(error).partition(chr(10))[0]}") from error
