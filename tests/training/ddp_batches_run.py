"""A fit under DDP on two processes that notes the batches each of them got: python ddp_batches_run.py ROWS OUTPUT"""

import json
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch

from lata_lightning.quickstart.experts import INSTRUCT
from lata_lightning.quickstart.make_checkpoints import make_tokenizer
from lata_lightning.training.data import ChatDataModule, RawTextDataModule
from lata_lightning.training.text_data import TextDataModule

PAIRS = [(f"ask {number}", f"say {number}") for number in range(40)]
RAW = "".join(chr(97 + number * number % 26) for number in range(400))


def data_modules(rows):
    """Every kind of text data, with six batches an epoch of each process."""
    sizes = {"batches_per_epoch": 6, "tokens_per_batch": 36, "context_length": 18}
    return {
        "mixture": ChatDataModule(make_tokenizer(), {"ask": PAIRS}, raw_texts=[RAW], raw_share=0.25, **sizes),
        "raw": RawTextDataModule(make_tokenizer(), [RAW], **sizes),
        "rows": TextDataModule(rows, tokenizer=str(INSTRUCT), batch_size=2, context_length=18),
        "stream": TextDataModule(rows, tokenizer=str(INSTRUCT), batch_size=2, context_length=18, streaming=True, batches_per_epoch=6),
    }


class Note(pl.LightningModule):
    """Trains nothing worth mentioning and notes what it sees, epoch by epoch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.current_epoch, batch["input_ids"].tolist()))
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, **options):
    note = Note()
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options
    )  # fmt: skip
    trainer.fit(note, datamodule=data)
    return trainer.global_rank, note.seen


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name, data in data_modules(sys.argv[1]).items():
        rank, seen = fit(data, strategy="ddp", devices=2)
        (Path(sys.argv[2]) / f"{name}{rank}.json").write_text(json.dumps(seen))
