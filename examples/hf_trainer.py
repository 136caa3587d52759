"""The Trainer of transformers with a task vector that is measured while it trains: python examples/hf_trainer.py [OUTPUT]"""

import sys

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from lata_lightning.callbacks.transformers import LATATrainerCallback
from lata_lightning.quickstart.corpus import replay_text
from lata_lightning.quickstart.experts import BASE, INSTRUCT


def main(output: str) -> None:
    tokens = AutoTokenizer.from_pretrained(INSTRUCT)(replay_text()[:32_000], verbose=False)["input_ids"]
    rows = [tokens[begin : begin + 128] for begin in range(0, len(tokens) // 128 * 128, 128)]
    callback = LATATrainerCallback((str(BASE), str(INSTRUCT)), every_n_train_steps=10)
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(INSTRUCT),
        TrainingArguments(
            output, num_train_epochs=1, per_device_train_batch_size=8, learning_rate=3e-4, report_to=[], save_strategy="epoch"
        ),
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}),
        callbacks=[callback],
    )
    # So that the figures go where the Trainer logs.
    callback.log_to(trainer)
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "hf-trainer-run")
