"""What of a model an adapter holds as factors, and what whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lata_lightning.errors import LataError, first_three
from lata_lightning.exports.structure import Form, Structure
from lata_lightning.merging.sum import Sum


@dataclass(frozen=True)
class Plan:
    """What of the model goes where.

    Attributes:
        factors: By path of the module, the name of its weight in the checkpoint and its form.
        saved: Paths of the modules that are stored whole.
        biases: Whether biases change that are in none of those.
    """

    factors: Mapping[str, tuple[str, Form]]
    saved: tuple[str, ...]
    biases: bool


def plan_adapter(total: Sum, structure: Structure) -> Plan:
    """Where everything that changes goes; every vector is read once for it.

    Raises:
        LataError: As ``plan_of``.
    """
    return plan_of([name for name in total.names if total.parts(name)], structure)


def plan_of(changed: Sequence[str], structure: Structure) -> Plan:
    """Where tensors go that change.

    Args:
        changed: Their names in a checkpoint.
        structure: The model.

    Raises:
        LataError: A tensor is in no module, or in no module but the model itself; or there is no matrix to adapt.
    """
    unknown = [name for name in changed if name not in structure.by_piece]
    if unknown:
        raise LataError(
            f"an adapter can only hold tensors of the modules that {type(structure.module).__name__} has; in no module are {first_three(unknown)}"
        )
    factors: dict[str, tuple[str, Form]] = {}
    biases: list[str] = []
    saved: set[str] = set()
    for name in changed:
        held = structure.by_piece[name]
        path, _, leaf = held.names[0].rpartition(".")
        form = structure.form(path) if held.plain and len(held.names) == 1 else None
        if form is not None and leaf == "weight":
            factors[path] = (name, form)
        elif form is not None and leaf == "bias":
            biases.append(path)
        else:
            # Adapters on both ends of a tie would be merged into the one weight twice, an adapter on one end be missing in the other's forward.
            saved.update(held.owners)
    if "" in saved:
        loose = [name for name in changed if "" in structure.by_piece[name].owners]
        raise LataError(
            f"an adapter holds whole modules only, and of the model itself are {first_three(loose)}. Export with --to hf instead."
        )
    saved = {path for path in saved if not any(path.startswith(other + ".") for other in saved)}
    covered = tuple(f"{path}." for path in saved)
    factors = {path: found for path, found in factors.items() if not f"{path}.".startswith(covered)}
    if not factors:
        what = f"the tensors that change are in no layer that peft can factor, {first_three(changed)}" if changed else "nothing changes"
        raise LataError(f"a LoRA adapter needs a matrix to adapt, and {what}. Export with --to hf instead.")
    return Plan(factors, tuple(sorted(saved)), any(not f"{path}.".startswith(covered) for path in biases))
