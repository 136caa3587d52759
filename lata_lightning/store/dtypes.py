"""Dtypes of stored tensors: their codes in safetensors files, names in torch and widths; torch is imported only where one of its dtypes is asked for."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from lata_lightning.errors import LataError

if TYPE_CHECKING:
    import torch


class _Stored(NamedTuple):
    """A dtype as files store it.

    Attributes:
        name: Its name in torch.
        size: Bytes of one entry.
        readable: Whether tensors of it are read and written; of others only the headers are.
    """

    name: str
    size: int
    readable: bool = True


_BY_CODE = {
    "F64": _Stored("float64", 8),
    "F32": _Stored("float32", 4),
    "F16": _Stored("float16", 2),
    "BF16": _Stored("bfloat16", 2),
    "I64": _Stored("int64", 8),
    "I32": _Stored("int32", 4),
    "I16": _Stored("int16", 2),
    "I8": _Stored("int8", 1),
    "U8": _Stored("uint8", 1),
    "BOOL": _Stored("bool", 1),
    "C64": _Stored("complex64", 8, readable=False),
    "U64": _Stored("uint64", 8, readable=False),
    "U32": _Stored("uint32", 4, readable=False),
    "U16": _Stored("uint16", 2, readable=False),
    "F8_E4M3": _Stored("float8_e4m3fn", 1, readable=False),
    "F8_E5M2": _Stored("float8_e5m2", 1, readable=False),
    "F8_E8M0": _Stored("float8_e8m0fnu", 1, readable=False),
}
_BY_NAME = {stored.name: code for code, stored in _BY_CODE.items()}
FloatName = Literal["float32", "bfloat16", "float16"]
FLOAT_NAMES: tuple[FloatName, ...] = get_args(FloatName)
"""Names of the dtypes that weights are written in."""


def is_known(code: str) -> bool:
    """Return whether a safetensors code is one of the format."""
    return code in _BY_CODE


def is_readable(code: str) -> bool:
    """Return whether tensors of a safetensors code can be read."""
    return code in _BY_CODE and _BY_CODE[code].readable


def item_size(code: str) -> int:
    """Return the bytes of one entry of a dtype, by its safetensors code."""
    return _BY_CODE[code].size


def dtype_name(code: str) -> str:
    """Return the name in torch of a dtype, by its safetensors code; an unknown code itself."""
    return _BY_CODE[code].name if code in _BY_CODE else code


def code_of_name(name: str) -> str | None:
    """Return the safetensors code of a dtype, by its name in torch; None if the format has none."""
    return _BY_NAME.get(name)


@cache
def torch_dtype(code: str) -> torch.dtype:
    """Return the dtype of a safetensors code."""
    import torch

    dtype: torch.dtype = getattr(torch, _BY_CODE[code].name)
    return dtype


def readable_code(dtype: torch.dtype) -> str | None:
    """Return the safetensors code of a dtype; None if tensors of it are neither read nor written."""
    code = code_of_name(str(dtype).removeprefix("torch."))
    return code if code is not None and _BY_CODE[code].readable else None


def float_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name, to write weights in.

    Raises:
        LataError: The name is none of ``FLOAT_NAMES``, which the message lists.
    """
    if name not in FLOAT_NAMES:
        raise LataError(f"unknown dtype {name!r}; choose one of {', '.join(FLOAT_NAMES)}")
    return torch_dtype(_BY_NAME[name])
