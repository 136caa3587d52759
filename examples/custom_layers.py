"""A module that is no transformer, with a rule of its own for what a layer is: python examples/custom_layers.py"""

import torch
from torch import nn

from lata_lightning import TaskVector, align, linear_drop_by_rank


class Network(nn.Module):
    """Three stages of two tensors each, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1, self.stage2, self.stage3 = (nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 4)


def moved(model: nn.Module, sizes: dict[str, float]) -> dict[str, torch.Tensor]:
    """A state dict with noise whose size depends on the stage."""
    return {name: tensor + sizes[name.split(".")[0]] * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


def main() -> dict[str, float]:
    torch.manual_seed(0)
    base = Network()
    even = {"stage1": 0.1, "stage2": 0.1, "stage3": 0.1, "head": 0.1}
    instruct = moved(base, even)
    model = Network()
    model.load_state_dict(instruct)
    tuned = moved(model, {"stage1": 0.01, "stage2": 0.05, "stage3": 0.2, "head": 0.1})
    rule = r"^stage\d"
    task = TaskVector.between(instruct, tuned, layers=rule)
    instruction = TaskVector.between(base, instruct, kind="instruction", layers=rule)
    alignment = align(task, instruction)
    coefficients = linear_drop_by_rank(alignment)
    for layer, value in alignment.values.items():
        print(f"{layer}: alignment {value:.3f}, coefficient {coefficients[layer]:.2f}")
    return coefficients


if __name__ == "__main__":
    main()
