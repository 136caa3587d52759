"""Model cards: the README.md of a saved task vector and of a merged model, in the form a hub accepts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lata_lightning.vectors.manifest import Manifest
from lata_lightning.vectors.provenance import Derivation
from lata_lightning.weighting import CLOSED_FORM

PAPER = "[LATA](https://arxiv.org/abs/2502.20186)"
PAPERS = {
    "regression": ("[RegMean](https://arxiv.org/abs/2212.09849)", "[RegMean++](https://arxiv.org/abs/2508.03121)"),
    "regression without samples": ("[WUDI](https://arxiv.org/abs/2503.08099)", "[ACTMat](https://arxiv.org/abs/2604.01329)"),
    "tsv": ("[TSV-M](https://arxiv.org/abs/2412.00081)",),
    "iso": ("[Iso-C](https://arxiv.org/abs/2502.04959)",),
}
"""The papers of the methods that make one vector from several."""
CLOSED_FORM_PAPER = "[submodule linearity](https://arxiv.org/abs/2504.10902)"


def vector_card(manifest: Manifest, name: str) -> str:
    """Return the card of a task vector: what it is, between which weights, its alignment and coefficients."""
    lines = front_matter([manifest.start_identity.location], "lata_lightning", ["task-vector", "task-arithmetic", "lata"])
    what = "An instruction vector (instruct − base)" if manifest.kind == "instruction" else f"A task vector (tuned − {manifest.start})"
    lines += [
        f"# {name}",
        "",
        f"{what} made with lata_lightning. **These are differences of weights, not a model**: add them to the model they start from.",
        "",
        "| | location | content hash |",
        "|---|---|---|",
        f"| start | {_cell(**asdict(manifest.start_identity))}",
        f"| tuned | {_cell(**asdict(manifest.tuned_identity))}",
        "",
    ]
    if manifest.step is not None:
        lines += [f"Taken at optimizer step {manifest.step}, after {manifest.epoch} finished epochs.", ""]
    if manifest.derivation is not None:
        lines += _derivation(manifest.derivation)
    if manifest.precision_loss is not None:
        cosine = manifest.precision_loss.cosine
        lines += [
            f"Stored below the precision it was measured in: {manifest.precision_loss.zero_fraction:.2%} of the nonzero entries became zero, "
            f"cosine to the full-precision difference {'undefined' if cosine is None else f'{cosine:.6f}'}.",
            "",
        ]
    if manifest.alignment is not None:
        by_rule = f"; coefficients by the rule `{manifest.weighting}`" if manifest.weighting != CLOSED_FORM else ""
        lines += [f"Alignment with the instruction vector, by {manifest.alignment.level}{by_rule} ({PAPER}):", ""]
        lines += ["| layer | alignment | relative norm | coefficient |", "|---|---|---|---|"]
        for layer, stats in manifest.alignment.layers.items():
            lines.append(f"| {layer} | {_numbers(stats.alignment, stats.relative_norm, stats.coefficient)} |")
        lines.append("")
        if manifest.alignment.flat:
            lines += [
                f"The alignments spread by {manifest.alignment.spread:.4f} only: too little to rank the layers by.",
                "",
            ]
        if manifest.alignment.by_relative_norm:
            lines += [
                "The ranking is one by relative norm: the rank correlation of alignment with −relative norm is "
                f"{manifest.alignment.norm_correlation:.2f}.",
                "",
            ]
    shown = manifest.alignment is not None and manifest.alignment.level == manifest.level and manifest.weighting != CLOSED_FORM
    if manifest.coefficients is not None and not shown:
        closed = manifest.weighting == CLOSED_FORM
        how = f"in closed form from samples of the task, by {manifest.level} ({CLOSED_FORM_PAPER})"
        lines += [f"Coefficients {how if closed else f'by the rule `{manifest.weighting}`, by {manifest.level}'}:", ""]
        lines += ["| layer | coefficient |", "|---|---|"]
        lines += [f"| {layer} | {_numbers(number)} |" for layer, number in manifest.coefficients.items()]
        lines.append("")
    if manifest.alignment is not None or manifest.coefficients is not None:
        lines += [f"Tensors outside the layers have coefficient {manifest.outside:g}.", ""]
    lines += ["Read it with `lata_lightning.TaskVector.open(path)`; check its bytes with `lata verify`.", ""]
    return "\n".join(lines)


def _derivation(made: Derivation) -> list[str]:
    """Return the lines on how a vector was made from others: method and settings, the vectors, and what was measured by layer."""
    settings = ", ".join(f"{name} {_value(value)}" for name, value in made.settings.items())
    papers = f" ({', '.join(PAPERS[made.name])})" if made.name in PAPERS else ""
    facts = list(dict.fromkeys(name for entry in made.inputs for name in entry.facts))
    lines = [f"Made by {made.name}{papers}{f', {settings}' if settings else ''}.", ""]
    if made.inputs:
        lines += ["| " + " | ".join(["made of", *facts]) + " |", "|---" * (1 + len(facts)) + "|"]
        lines += [f"| {' | '.join([entry.label, *(_value(entry.facts.get(name)) for name in facts)])} |" for entry in made.inputs]
        lines.append("")
    if made.averaged:
        lines += [f"{len(made.averaged)} tensors of two axes or more are plain means; the manifest names them.", ""]
    if made.measured:
        layers = list(dict.fromkeys(layer for entry in made.measured for layer in entry.layers))
        lines += [f"| {' | '.join(['layer', *(entry.title for entry in made.measured)])} |", "|---" * (1 + len(made.measured)) + "|"]
        lines += [f"| {layer} | {_numbers(*(entry.layers.get(layer) for entry in made.measured))} |" for layer in layers]
        lines.append("")
    return lines


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def merge_card(name: str, record: Mapping[str, Any]) -> str:
    """Return the card of a merged model: what it was made from, how, and by which command.

    Args:
        name: Title.
        record: The content of its merge record.
    """
    onto = record["onto"]
    lines = front_matter([onto["location"]], "transformers", ["merge", "task-arithmetic", "lata"])
    how = f"layer-aware task arithmetic ({PAPER})" if record.get("derivation") is None else "making one vector of several first"
    lines += [f"# {name}", "", f"Made with lata_lightning by {how}.", ""]
    lines += ["| | location | content hash |", "|---|---|---|", f"| onto | {_cell(**onto)}", ""]
    lines += ["| vector | scale | weighting | outside the layers |", "|---|---|---|---|"]
    lines += [f"| {term['vector']} | {term['scale']:g} | {term['weighting']} | {term['outside']:g} |" for term in record["terms"]]
    if record.get("derivation") is not None:
        lines += ["", *_derivation(Derivation.from_json(record["derivation"]))]
    if record.get("vocabulary"):
        lines += ["", f"Vocabulary: {record['vocabulary']['before']} rows before, {record['vocabulary']['after']} after."]
        lines += [f"- {note}" for note in record["vocabulary"]["notes"]]
    count = len(record["tensors"])
    lines += [
        "",
        f"{count} tensors, content hash `{record['content_hash']}`; per-tensor hashes and coefficients are in `merge.json`.",
        "",
    ]
    if record["command"]:
        lines += ["```", record["command"], "```", ""]
    return "\n".join(lines)


def _numbers(*numbers: float | None) -> str:
    return " | ".join("–" if number is None else f"{number:.4f}" for number in numbers)


def front_matter(bases: Sequence[str | None], library: str, tags: Sequence[str]) -> list[str]:
    """Return the lines with which a card on a hub begins.

    Args:
        bases: Locations of the models that it was made from; unknown ones are left out.
        library: The library that loads the files of the card.
        tags: Words to find it by.
    """
    lines = ["---", f"library_name: {library}"]
    located = [location for location in bases if location is not None]
    if located:
        lines.append("base_model:")
        # A JSON string is a YAML string, whatever characters are in it.
        lines += [f"- {json.dumps(location)}" for location in located]
    return [*lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""]


def _cell(location: str | None, revision: str | None, content_hash: str | None) -> str:
    where = "in memory" if location is None else f"`{location}`"
    at = "" if revision is None else f" at `{revision}`"
    return f"{where}{at} | {'–' if content_hash is None else f'`{content_hash}`'} |"
