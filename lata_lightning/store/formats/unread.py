"""Formats that are recognised by their content and refused, each with advice on how to convert it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from lata_lightning.store.descriptors import first_bytes
from lata_lightning.store.formats.format import Format, not_read
from lata_lightning.store.weight_files import MODEL_FILES

_DEEPSPEED_FILE = re.compile(r"(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_(model|optim)_states\.pt|mp_rank_\d+_model_states\.pt")


def _begins(*words: bytes) -> Callable[[Path], bool]:
    return lambda path: path.is_file() and first_bytes(path, 64).startswith(words)


def _is_deepspeed(path: Path) -> bool:
    # Where the trainer of transformers saved the model as well, there is nothing to convert.
    if any((path / name).is_file() for name in MODEL_FILES):
        return False
    folders = [path, *(part for part in path.iterdir() if part.is_dir())] if path.is_dir() else []
    return any(_DEEPSPEED_FILE.fullmatch(file.name) for folder in folders for file in folder.iterdir())


DEEPSPEED_DIRECTORY = not_read(
    "DeepSpeed checkpoint directory",
    _is_deepspeed,
    'Make one file of it, and give that: with Lightning, python -c "from lightning.pytorch.utilities.deepspeed import '
    "convert_zero_checkpoint_to_fp32_state_dict as convert; convert('{path}', 'full.ckpt')\"; otherwise python {path}/zero_to_fp32.py {path} OUTPUT",
)
UNREAD: tuple[Format, ...] = (
    DEEPSPEED_DIRECTORY,
    not_read(
        "GGUF file",
        _begins(b"GGUF"),
        "Its weights are quantised. Load it with transformers, AutoModelForCausalLM.from_pretrained(DIRECTORY, gguf_file={path.name!r}), which "
        "dequantises it, save_pretrained(…) and give that directory; better, give the model it was made from.",
    ),
    not_read(
        "Git LFS pointer",
        _begins(b"version https://git-lfs"),
        "It only names the file with the weights: run git lfs pull in its directory, or download it with hf download.",
    ),
    not_read("HDF5 file", _begins(b"\x89HDF\r\n"), "Load it with its own library and save it as safetensors."),
    not_read(
        "plain pickle",
        _begins(b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "Unpickling can run code. If you trust it, load it and write its tensors with safetensors.torch.save_file.",
    ),
)
