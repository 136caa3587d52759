"""Exchanging the classification head of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lata_lightning.errors import LataError, first_three
from lata_lightning.store.checkpoint_names import checkpoint_name_of
from lata_lightning.store.head_files import Head


@contextmanager
def with_head(model: Any, head: Head, label: str = "the model") -> Iterator[None]:
    """Give a classifier the tensors and class names of a head for the ``with`` block; afterwards its own are restored.

    Args:
        model: A classifier of transformers, with any number of classes.
        head: A head of the same architecture.
        label: Name of the model, for messages.

    Raises:
        LataError: The head belongs to another architecture, or the model lacks one of its tensors or has it in another shape.
    """
    config, modules = model.config, check_head(model, head, label)
    classes = config.id2label, config.label2id
    config.id2label, config.label2id = class_names(head)
    before = {modules[name]: _exchange(model, modules[name], tensor) for name, tensor in head.tensors.items()}
    try:
        yield
    finally:
        config.id2label, config.label2id = classes
        for name, tensor in before.items():
            _exchange(model, name, tensor)


def scored_with(head: Head, score: Callable[[Any], float], label: str = "the model") -> Callable[[Any], float]:
    """Return a function that scores models with this head in place of their own."""

    def scored(model: Any) -> float:
        with with_head(model, head, label):
            return score(model)

    return scored


def class_names(head: Head) -> tuple[dict[int, str], dict[str, int]]:
    """Return ``id2label`` and ``label2id`` for a config of transformers; classes without a name are named after their number."""
    names = head.labels or tuple(map(str, range(head.count)))
    return dict(enumerate(names)), {name: number for number, name in enumerate(names)}


def check_head(model: Any, head: Head, label: str = "the model") -> dict[str, str]:
    """Return the name in the classifier of each tensor of a head; arguments and errors as for ``with_head``."""
    head.check_model(model.config.model_type, label)
    if type(model).__name__ != head.architecture:
        raise LataError(f"the head of a {head.architecture} does not fit a {type(model).__name__}: it was trained for another kind of task")
    modules = {name: own for own, name in checkpoint_name_of(model).items()}
    state = model.state_dict(keep_vars=True)
    odd = [
        f"{name} {tuple(tensor.shape)}"
        for name, tensor in head.tensors.items()
        if name not in modules or not _fits(state[modules[name]], tensor, model.config.num_labels, head.count)
    ]
    if odd:
        raise LataError(
            f"the head does not fit {label}, which lacks these tensors or has them in another size: {first_three(odd)}. Give the head of a fine-tune "
            "of this model."
        )
    return modules


def _fits(own: Tensor, given: Tensor, classes: int, count: int) -> bool:
    """Return whether the shapes agree, apart from axes whose length is the number of classes on each side."""
    return own.dim() == given.dim() and all(
        one == other or (one == classes and other == count) for one, other in zip(own.shape, given.shape, strict=True)
    )


def _exchange(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Replace a parameter or buffer, and return the old one."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    own: Tensor = getattr(module, leaf)
    value = tensor.to(own.device, own.dtype)
    if leaf in module._parameters:
        module._parameters[leaf] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=own.requires_grad)
    else:
        module._buffers[leaf] = value
    return own
