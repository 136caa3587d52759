import signal
import sys

import lightning.pytorch as pl
import pytest
import torch

from lata_lightning.training.interrupting import interruptible

pytestmark = pytest.mark.filterwarnings("ignore")


class Small(pl.LightningModule):
    """Presses Ctrl-C, or leaves, in its first step."""

    def __init__(self, action):
        super().__init__()
        self.layer, self.action = torch.nn.Linear(2, 1), action

    def training_step(self, batch, _):
        self.action()
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit_small(action, folder):
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=folder
    )
    with interruptible("go on"):
        trainer.fit(Small(action), torch.utils.data.DataLoader(torch.ones(2, 2)))


def test_an_interrupted_fit_raises_keyboard_interrupt_with_advice(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="go on"):
        fit_small(lambda: signal.raise_signal(signal.SIGINT), tmp_path)


def test_an_exit_that_was_no_interruption_stays_one(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        fit_small(lambda: sys.exit(3), tmp_path)
    assert stopped.value.code == 3
