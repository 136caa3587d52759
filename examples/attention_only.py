"""Fine-tune nothing but the attention projections, and measure the task vector on the way: python examples/attention_only.py [OUTPUT]"""

import sys

import lightning.pytorch as pl
from transformers import AutoTokenizer

from lata_lightning import AttentionOnlyFinetuning, LATACallback, TaskVector
from lata_lightning.evaluation.accuracy import ExactMatch
from lata_lightning.quickstart.exercises import exercises
from lata_lightning.quickstart.experts import BASE, INSTRUCT, Expert, fine_tune


def main(output: str) -> None:
    pl.seed_everything(0, verbose=False)
    # Attention alone takes a higher learning rate than the whole model.
    string = Expert(("reverse",), epochs=2, batches_per_epoch=40, learning_rate=5e-3)
    module, data, options = fine_tune("string", table={"string": string})
    callbacks = [
        AttentionOnlyFinetuning(),
        LATACallback(instruction_vector=(str(BASE), str(INSTRUCT)), output_dir=output),
    ]
    problems = ExactMatch(AutoTokenizer.from_pretrained(INSTRUCT), exercises("reverse", "test", 200, 0))
    before = problems(module.model)
    pl.Trainer(**options, callbacks=callbacks).fit(module, datamodule=data)
    vector = TaskVector.open(f"{output}/task_vector")
    trained = [name for name in vector if name not in vector.unchanged]
    print(f"trained: {len(trained)} of {len(vector)} tensors, in the first block {[name for name in trained if '.layers.0.' in name]}")
    print(f"answers to 'reverse …' that are right: {before:.2f} before, {problems(module.model):.2f} after")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "attention-only-run")
