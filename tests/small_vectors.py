"""Task vectors over the small state dicts of the tests."""

import json

import torch
from tiny_models import weights

from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.task_vector import TaskVector


def vector(tensors, **options):
    return TaskVector.between({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, tensors, **options)


def differences(start, tuned):
    return {name: tuned[name].float() - start[name].float() for name in start}


def weighted(task, rule="linear", **options):
    return task.weighted(align(task, vector(weights(7), kind="instruction"), check_base=False), rule, **options)


def edit(directory, change):
    """Change the manifest of a saved vector."""
    path = directory / "task_vector.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
