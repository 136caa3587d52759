"""The callback in a plain Trainer, from a custom LightningModule: python examples/plain_trainer.py [OUTPUT]"""

import sys

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lata_lightning import LATACallback
from lata_lightning.quickstart.corpus import replay_text
from lata_lightning.quickstart.experts import BASE, INSTRUCT


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        # from_pretrained gives a model in evaluation mode, and Lightning keeps it so.
        self.model = AutoModelForCausalLM.from_pretrained(INSTRUCT).train()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


def main(output: str) -> None:
    pl.seed_everything(0, verbose=False)
    tokens = AutoTokenizer.from_pretrained(INSTRUCT)(replay_text()[:32_000], verbose=False)["input_ids"]
    windows = torch.tensor(tokens[: len(tokens) // 128 * 128]).view(-1, 128)
    callback = LATACallback(instruction_vector=(str(BASE), str(INSTRUCT)), every_n_train_steps=10, output_dir=output)
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback])
    trainer.fit(Module(), DataLoader(windows, batch_size=8, shuffle=True))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "plain-trainer-run")
