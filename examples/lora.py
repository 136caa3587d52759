"""LoRA: what the adapters add is measured in training and exported as a task vector: python examples/lora.py [OUTPUT]"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

from lata_lightning import LATACallback, TaskVector
from lata_lightning.quickstart.experts import BASE, INSTRUCT
from lata_lightning.training.module import CausalLMModule
from lata_lightning.training.text_data import TextDataModule

ROWS = Path(__file__).parent.parent / "recipes" / "data" / "string.jsonl"


def main(output: Path) -> None:
    pl.seed_everything(0, verbose=False)
    module = CausalLMModule(str(INSTRUCT), learning_rate=5e-3, lora={"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]})
    data = TextDataModule(str(ROWS), batch_size=16, context_length=64)
    callback = LATACallback((str(BASE), str(INSTRUCT)), output_dir=output / "lata", level="submodule")
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback])
    trainer.fit(module, datamodule=data)

    # The adapter as peft keeps it stands for the same vector.
    module.model.save_pretrained(output / "adapter")
    measured, stored = TaskVector.open(output / "lata/task_vector"), TaskVector.between(str(INSTRUCT), str(output / "adapter"))
    gap = max((measured[name] - stored[name]).abs().max().item() for name in measured)
    moved = [name for name in measured if torch.count_nonzero(measured[name])]
    print(f"{len(moved)} of {len(measured)} tensors moved; vector and adapter differ by at most {gap:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "lora-run"))
