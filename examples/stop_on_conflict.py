"""Stop a fine-tune that turns against another expert: python examples/stop_on_conflict.py [OUTPUT]

The expert has learned sums. The second fine-tune is given other answers to the same questions: first both learn the form of an answer, and their vectors
are alike; then they part.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from lata_lightning import LATACallback
from lata_lightning.quickstart.experts import INSTRUCT


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(INSTRUCT).train()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(answer: Callable[[int, int], int], epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(INSTRUCT)
    rows = [tokenizer(f"{a} + {b} = {answer(a, b)}") for a in range(10, 26) for b in range(10, 26)]
    data = DataLoader(rows, 32, shuffle=True, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=list(callbacks))
    trainer.fit(Module(), data)
    return trainer


def main(output: Path) -> None:
    fit(lambda a, b: a + b, 4, LATACallback(output_dir=output / "sums", table=False))
    watch = LATACallback(compare_with={"sums": output / "sums/task_vector"}, output_dir=output / "others", table=False)
    # Once the vectors have parted for two epochs. With divergence_threshold=… it stops at a cosine of your choice.
    conflict = EarlyStopping("lata/cosine/sums", mode="max", patience=2, check_on_train_epoch_end=True)
    trainer = fit(lambda a, b: 100 - a - b, 8, watch, conflict)
    print(f"stopped after epoch {trainer.current_epoch} of 8: cosine {trainer.callback_metrics['lata/cosine/sums']:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "conflict-run"))
