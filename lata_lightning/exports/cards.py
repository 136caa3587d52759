"""Model cards of exports, and the reconstruction errors in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lata_lightning.exports.factors import DEFAULT_RANK, Truncation, relative
from lata_lightning.layers import LayerMap
from lata_lightning.merging.merge import Term
from lata_lightning.vectors.cards import PAPER, front_matter

RECONSTRUCTION = "reconstruction.json"


def reconstruction(
    figures: Mapping[str, tuple[str, int | None, float, float]], layers: LayerMap, truncation: Truncation, dtype: str | None
) -> dict[str, Any]:
    """Return the reconstruction errors of an adapter, as plain types.

    Args:
        figures: For each tensor, how it is stored: ``factors`` (exact up to rounding), ``cut`` (truncated to a rank) or ``whole``; its rank; ‖error‖² and
            ‖τ‖².
        layers: The layer of each tensor.
        truncation: How dense differences were truncated.
        dtype: Dtype of the adapter; None for the defaults.

    Returns:
        ``all``, ``layers`` (by block), ``outside`` and ``tensors`` with relative errors ‖τ − added‖ / ‖τ‖ as float64; null where τ is zero.
    """
    blocks: dict[str, list[float]] = {block: [0.0, 0.0] for block in layers.blocks}
    outside = {}
    for name, (_, _, error, norm) in figures.items():
        block = layers.positions[name].block if name in layers.positions else None
        if block is None:
            outside[name] = relative(error, norm)
        else:
            blocks[block][0] += error
            blocks[block][1] += norm
    return {
        "rank": None if truncation.energy is not None else truncation.rank or DEFAULT_RANK,
        "energy": truncation.energy,
        "dtype": dtype,
        "all": relative(sum(error for _, _, error, _ in figures.values()), sum(norm for *_, norm in figures.values())),
        "layers": {block: relative(*sums) for block, sums in blocks.items()},
        "outside": outside,
        "tensors": {
            name: {"held": storage, "rank": rank, "error": relative(error, norm)} for name, (storage, rank, error, norm) in figures.items()
        },
    }


def adapter_card(
    name: str, location: str | None, revision: str | None, terms: Sequence[Term], record: Mapping[str, Any], command: str | None
) -> str:
    """Return the card of an adapter: its start model, its vectors, and its reconstruction errors."""
    lines = front_matter([location], "peft", ["lora", "task-arithmetic", "lata"])
    at = "" if revision is None else f" at `{revision}`"
    storage = [tensor["held"] for tensor in record["tensors"].values()]
    rank = f"the smallest rank that keeps {record['energy']:g} of ‖τ‖²" if record["energy"] is not None else f"rank {record['rank']}"
    lines += [
        f"# {name}",
        "",
        f"A LoRA adapter made with lata_lightning from task vectors ({PAPER}), for {'a model in memory' if location is None else f'`{location}`'}{at}.",
        "",
        "| vector | scale | weighting |",
        "|---|---|---|",
        *(f"| {term.vector.label} | {term.scale:g} | {term.vector.manifest.weighting} |" for term in terms),
        "",
        f"{storage.count('factors')} tensors are stored as the factors they were trained in; {storage.count('cut')} are dense differences truncated to "
        f"{rank}; {storage.count('whole')} are stored whole, rounded as in any model of that precision.",
        "",
        "What the adapter adds differs from the weighted vector τ by (‖τ − added‖ / ‖τ‖, measured in float64; by tensor in "
        f"`{RECONSTRUCTION}`):",
        "",
        "| | error |",
        "|---|---|",
        f"| all | {_error(record['all'])} |",
        *(f"| {layer} | {_error(error)} |" for layer, error in (*record["layers"].items(), *record["outside"].items())),
        "",
    ]
    if command is not None:
        lines += ["```", command, "```", ""]
    return "\n".join(lines)


def mergekit_card(name: str, location: str, models: Sequence[tuple[Term, str, bool]], record: Mapping[str, Any]) -> str:
    """Return the card of an input for mergekit: the command that runs it, and how its result compares with that of ``lata merge``.

    Args:
        name: Title of the card.
        location: The start model.
        models: The terms, the path of the model of each, and whether it was written here.
        record: ``dtype`` of the written models and ``out_dtype`` of the result.
    """
    lines = front_matter([location], "mergekit", ["merge", "task-arithmetic", "lata"])
    lines += [
        f"# {name}",
        "",
        f"Task arithmetic for mergekit, with one weight for each tensor: scale · coefficient of the vector ({PAPER}). Run it in this directory:",
        "",
        "```",
        "mergekit-yaml merge.yaml OUTPUT",
        "```",
        "",
        "| vector | scale | weighting | model |",
        "|---|---|---|---|",
        *(
            f"| {term.vector.label} | {term.scale:g} | {term.vector.manifest.weighting} | `{path}`, "
            f"{'start + vector in ' + record['dtype'] if written else 'the tuned model itself'} |"
            for term, path, written in models
        ),
        "",
        "The result is what `lata merge` writes, up to rounding. A tensor whose weights are all 0 equals that of the start. "
        "All others mergekit subtracts, multiplies and adds in float32, where `lata merge` does so in float64 and rounds once:",
        "",
    ]
    if record["out_dtype"] in ("bfloat16", "float16"):
        lines += [
            f"the error of float32 is far below one rounding to {record['out_dtype']}, so nearly all entries are equal, and the others differ by one "
            "unit in the last place.",
            "",
        ]
    else:
        lines += ["an entry may differ by some units in the last place of the largest of the numbers that are summed.", ""]
    return "\n".join(lines)


def _error(error: float | None) -> str:
    return "–" if error is None else f"{error:.3g}"
