"""Quantised weights, which are refused with advice on how to get full weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lata_lightning.errors import SourceError
from lata_lightning.store.layout import Entry

_BY_LIBRARY = {
    "bitsandbytes": "model.dequantize()",
    "fp8": "from_pretrained(…, quantization_config=FineGrainedFP8Config(dequantize=True))",
    "mxfp4": "from_pretrained(…, quantization_config=Mxfp4Config(dequantize=True))",
    "compressed-tensors": "from_pretrained(…, quantization_config=CompressedTensorsConfig(run_compressed=False))",
}
# Endings of the tensors that packed weights are made of, with the library that writes them.
_PACKED = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_scale_inv": "fp8",
    "_blocks": "mxfp4",
}


def check_not_quantised(location: str | None, entries: Mapping[str, Entry], config: Mapping[str, Any] | None) -> None:
    """Refuse quantised weights, as the difference of two roundings says nothing about the weights.

    Args:
        location: Path or hub id, for the message.
        entries: Their tensors.
        config: Content of config.json, if there is one.

    Raises:
        SourceError: They are quantised, by their config or by their tensors.
    """
    method = quantisation(entries, config)
    if method is None:
        return
    call = _BY_LIBRARY.get(method)
    load = (
        f"load it with transformers, {call}" if call is not None else "load it with transformers and dequantise it, where its library can"
    )
    raise SourceError(
        f"{location} must hold the weights in full; they are quantised by {method}. Give the model they were made from, or {load}, save_pretrained(…), "
        "and give that directory."
    )


def quantisation(entries: Mapping[str, Entry], config: Mapping[str, Any] | None) -> str | None:
    """Return the library that quantised some weights; None if they are not quantised."""
    settings = (config or {}).get("quantization_config")
    if isinstance(settings, dict) and settings:
        return _usual_name(str(settings.get("quant_method", "an unknown method")))
    for ending, library in _PACKED.items():
        if any(name.endswith(ending) and _packs(name, ending, entries) for name in entries):
            return library
    if any(entry.code.startswith(("F8", "F4")) for entry in entries.values()):
        return "fp8"
    scaled = (name.removesuffix("_scale") for name in entries if name.endswith(".weight_scale"))
    return "compressed-tensors" if any(name in entries and entries[name].code in ("I8", "U8") for name in scaled) else None


def _packs(name: str, ending: str, entries: Mapping[str, Entry]) -> bool:
    """Return whether a tensor is packed, and not only named like a packed one."""
    if ending == "_blocks":
        return entries[name].code == "U8" and name.removesuffix(ending) + "_scales" in entries
    return ending != ".qweight" or not entries[name].code.startswith(("F", "B"))


def _usual_name(method: str) -> str:
    return "bitsandbytes" if method.startswith("bitsandbytes") else method
