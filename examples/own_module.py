"""The callback in a LightningModule that holds no transformer, a small network for images: python examples/own_module.py [OUTPUT]

Its repeated children are the layers. "base" is the fresh network, "instruct" the one that tells stripes apart; it is then fine-tuned to tell where
a spot is.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lata_lightning import LATACallback, TaskVector


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16)

    def forward(self, images: Tensor) -> Tensor:
        return images + torch.relu(self.norm(self.convolution(images)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(16 * 64, 4)

    def forward(self, images: Tensor) -> Tensor:
        images = self.stem(images)
        for block in self.blocks:
            images = block(images)
        return self.head(images.flatten(1))


class Module(pl.LightningModule):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def stripes(count: int) -> TensorDataset:
    """Stripes of one of four directions, in noise."""
    directions = torch.randint(4, (count,))
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    phases = torch.stack([rows, columns, rows + columns, rows - columns])[directions] + torch.randint(4, (count, 1, 1))
    return TensorDataset((phases % 4 < 2).float()[:, None] + 0.5 * torch.randn(count, 1, 8, 8), directions)


def spots(count: int) -> TensorDataset:
    """A spot in one of four quarters, in noise."""
    quarters = torch.randint(4, (count,))
    images = 0.5 * torch.randn(count, 1, 8, 8)
    for image, quarter in zip(images, quarters.tolist(), strict=True):
        row, column = (quarter // 2) * 4 + int(torch.randint(3, ())), (quarter % 2) * 4 + int(torch.randint(3, ()))
        image[0, row : row + 2, column : column + 2] += 2
    return TensorDataset(images, quarters)


def fit(network: Network, data: TensorDataset, *callbacks: pl.Callback) -> None:
    trainer = pl.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=list(callbacks))
    trainer.fit(Module(network), DataLoader(data, batch_size=32, shuffle=True))


def weights(network: Network) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def main(output: Path) -> None:
    pl.seed_everything(0, verbose=False)
    network = Network()
    base = weights(network)
    fit(network, stripes(1024))
    instruction = TaskVector.between(base, weights(network), kind="instruction")
    # The module holds one network; the path says that tensors are named as in its state dict, not as in the LightningModule's.
    callback = LATACallback(instruction, model="network", weighting="log", output_dir=output)
    fit(network, spots(1024), callback)
    print({layer: round(value, 3) for layer, value in callback.alignment.values.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "own-module-run"))
