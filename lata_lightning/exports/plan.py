"""Deciding which tensors an adapter stores as factors, and which modules whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lata_lightning.errors import LataError, first_three
from lata_lightning.exports.structure import AdapterForm, Structure
from lata_lightning.merging.sum import Sum


@dataclass(frozen=True)
class Plan:
    """How an adapter stores the tensors of a model that change.

    Attributes:
        factors: For each module with factors, by path: the name of its weight in the checkpoint, and its form.
        saved: Paths of the modules that are stored whole.
        biases: Whether biases of other modules change.
    """

    factors: Mapping[str, tuple[str, AdapterForm]]
    saved: tuple[str, ...]
    biases: bool


def plan_adapter(total: Sum, structure: Structure) -> Plan:
    """Plan an adapter for the tensors that a sum changes; reads every vector once.

    Raises:
        LataError: As for ``plan_of``.
    """
    return plan_of([name for name in total.names if total.differences(name)], structure)


def plan_of(changed: Sequence[str], structure: Structure) -> Plan:
    """Plan an adapter for tensors that change.

    Args:
        changed: Their names in a checkpoint.
        structure: The model.

    Raises:
        LataError: A tensor belongs to no module, or directly to the model; or there is no matrix to adapt.
    """
    unknown = [name for name in changed if name not in structure.by_stored_name]
    if unknown:
        raise LataError(
            f"an adapter can only hold tensors of the modules that {type(structure.module).__name__} has; in no module are {first_three(unknown)}"
        )
    factors: dict[str, tuple[str, AdapterForm]] = {}
    biases: list[str] = []
    saved: set[str] = set()
    for name in changed:
        tensor = structure.by_stored_name[name]
        path, _, leaf = tensor.names[0].rpartition(".")
        form = structure.form(path) if tensor.plain and len(tensor.names) == 1 else None
        if form is not None and leaf == "weight":
            factors[path] = (name, form)
        elif form is not None and leaf == "bias":
            biases.append(path)
        else:
            # Adapters on both users of a tied weight would be merged into it twice, and an adapter on one user would be missing in the other.
            saved.update(tensor.owners)
    if "" in saved:
        loose = [name for name in changed if "" in structure.by_stored_name[name].owners]
        raise LataError(
            f"an adapter holds whole modules only, and of the model itself are {first_three(loose)}. Export with --to hf instead."
        )
    saved = {path for path in saved if not any(path.startswith(other + ".") for other in saved)}
    covered = tuple(f"{path}." for path in saved)
    factors = {path: entry for path, entry in factors.items() if not f"{path}.".startswith(covered)}
    if not factors:
        what = f"the tensors that change are in no layer that peft can factor, {first_three(changed)}" if changed else "nothing changes"
        raise LataError(f"a LoRA adapter needs a matrix to adapt, and {what}. Export with --to hf instead.")
    return Plan(factors, tuple(sorted(saved)), any(not f"{path}.".startswith(covered) for path in biases))
