"""A run that breaks off and goes on ends with the vector of the uninterrupted one, bit for bit: python examples/resume.py [OUTPUT]"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lata_lightning import LATACallback, TaskVector
from lata_lightning.quickstart.experts import BASE, INSTRUCT
from lata_lightning.training.module import CausalLMModule
from lata_lightning.training.text_data import TextDataModule

ROWS = Path(__file__).parent.parent / "recipes" / "data" / "math.jsonl"


class PowerCut(pl.Callback):
    """Breaks the run off in its second epoch."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("power cut")


def fit(output: Path, *more: pl.Callback, resume: Path | None = None) -> None:
    pl.seed_everything(0, verbose=False)
    module, data = CausalLMModule(str(INSTRUCT), learning_rate=1e-3), TextDataModule(str(ROWS), context_length=64)
    callbacks = [
        LATACallback((str(BASE), str(INSTRUCT)), output_dir=output / "lata", table=False),
        ModelCheckpoint(output / "checkpoints", save_last="link"),
    ]
    trainer = pl.Trainer(max_epochs=2, limit_train_batches=5, accelerator="cpu", logger=False, callbacks=[*callbacks, *more])
    # The checkpoint holds the trained weights, the step and, in some fifty bytes a tensor, by which start to know the run again.
    trainer.fit(module, datamodule=data, ckpt_path=resume)


def main(output: Path) -> bool:
    fit(output / "whole")
    try:
        fit(output / "broken", PowerCut())
    except RuntimeError as error:
        print(f"broken off: {error}")
    fit(output / "broken", resume=output / "broken/checkpoints/last.ckpt")
    whole, resumed = (TaskVector.open(output / name / "lata/task_vector") for name in ("whole", "broken"))
    same = all(torch.equal(whole[name], resumed[name]) for name in whole)
    histories = [(output / name / "lata/history.jsonl").read_text() for name in ("whole", "broken")]
    print(f"same vector: {same}, same history: {histories[0] == histories[1]}")
    return same


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "resume-run"))
