import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console as Terminal

from lata_lightning import LATACallback
from lata_lightning.training import progress
from lata_lightning.training.progress import FitProgress

pytestmark = pytest.mark.filterwarnings("ignore")


class Small(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.block = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])

    def training_step(self, batch, _):
        loss = self.block[1](self.block[0](batch)).square().mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, *callbacks, epochs=2):
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[*callbacks],
    )  # fmt: skip
    trainer.fit(Small(), torch.utils.data.DataLoader(torch.ones(4, 2), 2))
    return trainer


def test_progress_of_all_epochs_goes_to_standard_error_with_the_figures_of_lata(tmp_path, capsys):
    fit(tmp_path, FitProgress(), LATACallback(output_dir=tmp_path / "lata", table=False))
    printed, said = capsys.readouterr()
    lines = [line for line in said.splitlines() if line.startswith("lata fit:")]
    assert lines[0].startswith("lata fit: step 2 of 4, loss ")
    assert "lata task norm 0." in lines[0]
    assert lines[0].endswith(" s left")
    assert lines[-1].startswith("lata fit: step 4 of 4, loss ")
    assert printed == ""


def test_progress_shows_nothing_where_it_is_switched_off(tmp_path, capsys):
    bar = FitProgress()
    bar.disable()
    monitor = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False, default_root_dir=tmp_path, callbacks=[bar]
    )  # fmt: skip
    bar.disable()
    monitor.fit(Small(), torch.utils.data.DataLoader(torch.ones(4, 2), 2))
    assert "lata fit:" not in capsys.readouterr().err


def test_on_a_terminal_the_bar_ends_before_anything_else_is_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "Console", lambda stderr: Terminal(stderr=stderr, force_terminal=True, width=100))
    after = []

    class After(pl.Callback):
        def on_train_end(self, trainer, module):
            after.append(bar._bar)

    bar = FitProgress()
    fit(tmp_path, bar, After())
    assert after == [None]
    said = capsys.readouterr().err
    assert "4/4" in said
    assert "loss" in said
