"""Small modules with tensors of every kind, and a fit of one without Lightning."""

import torch
from torch import nn

from lata_lightning.live.gathering import export, manifest_of
from lata_lightning.live.measuring import Measurement
from lata_lightning.live.placements.replicated import Replicated
from lata_lightning.live.tracker import Tracker


class Layer(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.attention = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, values):
        return self.norm(self.attention(values))


class Stack(nn.Module):
    """Two layers with batch norms; what a test adds to it is not used in the forward pass."""

    def __init__(self, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))

    def forward(self, values):
        for layer in self.layers:
            values = layer(values)
        return values


def follow(root, **options):
    """A tracker of a module as a fresh run has it before the first step, and its measurement."""
    tracker = Tracker(root, **options)
    tracker.capture_early()
    tracker.settle(None)
    tracker.begin()
    return tracker, Measurement(tracker, None, "instruct")


def train(module, steps=2):
    """A few steps of training in place."""
    optimizer = torch.optim.SGD([parameter for parameter in module.parameters() if parameter.requires_grad], lr=0.1)
    for step in range(steps):
        values = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        module(values).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def exported(tracker):
    """Differences by name, and the names that are recorded as unchanged."""
    return export(
        tracker,
        lambda vector: ({name: vector[name].clone() for name in vector}, vector.unchanged),
        manifest_of(tracker, "instruct", None, 1, 1),
    )


class Part(Replicated):
    """A part of a whole tensor that lies on this process alone."""

    def __init__(self, tensor, region):
        super().__init__(tensor)
        self.part = region

    @property
    def region(self):
        return self.part

    @property
    def replicated(self):
        return False

    def values(self):
        return self.part.of(super().values())
