"""Models whose outputs can be worked out by hand, and vectors between them."""

import copy

import torch
from torch import nn

from lata_lightning import TaskVector


class Chain(nn.Module):
    """Blocks that are linear in their parameters, each fed with what the one before gives out."""

    def __init__(self, width=4, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])

    def forward(self, hidden, attention_mask=None):
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def tuned(start, size=0.3, seed=1):
    """A copy of a model with noise on all its parameters."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(start)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def vectors_of(start, models):
    # A single block repeats nothing by which it could be found.
    rule = r"^blocks\.\d+" if isinstance(start, Chain) and len(start.blocks) == 1 else None
    return [TaskVector.between(start, model, layers=rule) for model in models]


def changed(start, **tensors):
    """A copy of a model in which some tensors (named with __ for dots) are set."""
    model = copy.deepcopy(start)
    with torch.no_grad():
        for name, value in tensors.items():
            model.get_parameter(name.replace("__", ".")).copy_(torch.as_tensor(value))
    return model
