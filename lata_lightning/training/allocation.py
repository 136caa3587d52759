"""How the C library hands memory back while a model is trained on a processor."""

from __future__ import annotations

import ctypes
import platform

LARGE = 1 << 20
"""Bytes from which a buffer is mapped by itself."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def return_large_buffers() -> bool:
    """Let buffers of a mebibyte or more go back to the system as soon as they are freed; whether the C library can be told so.

    glibc raises this threshold to 32 MiB as a program runs. Activations then share one heap with small tensors that live longer, and the heap cannot
    shrink: a LoRA fine-tune of 135 M parameters reached twice the memory it used.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGE)) and bool(mallopt(_M_TRIM_THRESHOLD, LARGE))
