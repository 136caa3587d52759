"""Modules of one's own under LATACallback: buffers, and hooks that Lightning's documentation recommends."""

import lightning.pytorch as pl
import pytest
import torch
from lightning_models import trainer
from torch import nn

from lata_lightning import LATACallback, TaskVector

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Masked(pl.LightningModule):
    """Two encoder layers under a causal mask that is a persistent buffer, and a batch norm after them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.0) for _ in range(2))
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5))

    def training_step(self, batch, batch_idx):
        values = batch[0]
        for layer in self.layers:
            values = layer(values, src_mask=self.mask)
        return self.norm(values).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)

    def train_dataloader(self):
        values = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(1))
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(values), batch_size=4)


class WithoutTeacher(Masked):
    """Leaves its frozen teacher out of checkpoints, as Lightning's documentation recommends."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(8, 8).requires_grad_(False)

    def state_dict(self):
        return {name: tensor for name, tensor in super().state_dict().items() if not name.startswith("teacher.")}


@pytest.mark.parametrize("kind", [Masked, WithoutTeacher])
def test_a_module_with_infinite_buffers_and_a_state_dict_of_its_own_leaves_the_vector_of_its_weights(tmp_path, kind):
    trained = []
    for callbacks in ([], [LATACallback(output_dir=tmp_path / "lata", table=False)]):
        module = kind()
        start = {name: parameter.detach().double().clone() for name, parameter in module.named_parameters()}
        run = trainer(tmp_path, *callbacks, enable_checkpointing=False)
        run.fit(module)
        trained.append(dict(module.named_parameters()))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in start)
    vector = TaskVector.open(tmp_path / "lata/task_vector")
    for name, before in start.items():
        torch.testing.assert_close(vector[name].double(), trained[1][name].detach().double() - before, rtol=0, atol=1e-8)
    norm = sum((trained[1][name].detach().double() - before).square().sum() for name, before in start.items()).sqrt()
    assert run.callback_metrics["lata/task_norm"].item() == pytest.approx(norm.item(), rel=1e-6)
