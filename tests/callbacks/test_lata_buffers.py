"""Modules of one's own under LATACallback: buffers, and hooks that Lightning's documentation recommends."""

from copy import deepcopy

import lightning.pytorch as pl
import pytest
import torch
from lightning_models import EXPECTED_WARNINGS, Module, batches, trainer
from tiny_models import read_back
from torch import nn
from transformers import LlamaForCausalLM

from lata_lightning import LATACallback, TaskVector, Term, merge

pytestmark = EXPECTED_WARNINGS


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


class Ema(Masked):
    """A teacher that follows its student after every batch."""

    def __init__(self):
        super().__init__()
        self.teacher = deepcopy(self.layers).requires_grad_(False)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for own, other in zip(self.teacher.parameters(), self.layers.parameters(), strict=True):
                own.lerp_(other, 0.1)


class Target(Masked):
    """A target network that is set to the trained one at the end of an epoch."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(5, 5).requires_grad_(False)
        self.own = nn.Linear(5, 5)

    def on_train_epoch_end(self):
        self.teacher.load_state_dict(self.own.state_dict())


class Unfrozen(Masked):
    """A part that is set by hand, and trained from then on."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(5, 5).requires_grad_(False)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.teacher.reset_parameters()
            self.teacher.requires_grad_(True)


@pytest.mark.parametrize("kind", [Ema, Target, Unfrozen])
def test_a_teacher_that_follows_by_hand_is_left_out_and_the_student_exported(tmp_path, kind):
    module = kind()
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    with pytest.warns(UserWarning, match=r"were changed while they asked for no gradient, and are left out of the task vector.*teacher"):
        trainer(tmp_path, LATACallback(output_dir=tmp_path / "lata", table=False), enable_checkpointing=False).fit(module)
    vector = TaskVector.open(tmp_path / "lata/task_vector")
    assert not [name for name in vector if name.startswith("teacher.")]
    for name, parameter in module.named_parameters():
        if not name.startswith("teacher."):
            torch.testing.assert_close(vector[name], parameter.detach() - start[name], rtol=0, atol=0)
    merge(kind().state_dict(), [Term(vector)], tmp_path / "merged")
    merged = read_back(tmp_path / "merged")
    for name, parameter in module.named_parameters():
        expected = start[name] if name.startswith("teacher.") else parameter.detach()
        torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-7)


def test_no_alignment_is_stored_that_took_a_changed_tensor_for_unchanged(tmp_path, models):
    module = Module(LlamaForCausalLM.from_pretrained(models / "instruct"))
    module.model.lm_head.requires_grad_(False)
    module.on_train_batch_end = lambda *args: module.model.lm_head.weight.data.mul_(0.9)
    with pytest.warns(UserWarning, match=r"Alignments took them for unchanged, so none is stored"):
        trainer(tmp_path, LATACallback(models / "instruction", output_dir=tmp_path / "lata", table=False)).fit(module, batches())
    vector = TaskVector.open(tmp_path / "lata/task_vector")
    assert vector.manifest.alignment is None
    assert vector.manifest.coefficients is None
    assert "lm_head.weight" not in set(vector)
