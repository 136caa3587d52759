"""A weighting rule of one's own, merged like any other: python examples/own_weighting.py [OUTPUT]

This one weights a layer by how far it has moved for the length of its instruction vector, without ranks: a control to compare any rule by alignment with.
LATACallback(weighting=by_relative_norm) would weight the exports of a run by it.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl

from lata_lightning import Alignment, LATACallback, TaskVector, Term, align, linear_drop_by_rank, merge
from lata_lightning.quickstart.experts import BASE, INSTRUCT
from lata_lightning.training.module import CausalLMModule
from lata_lightning.training.text_data import TextDataModule

ROWS = Path(__file__).parent.parent / "recipes" / "data" / "string.jsonl"


def by_relative_norm(alignment: Alignment) -> dict[str, float]:
    """Relative norm of every layer, as a share of the largest."""
    norms = {layer: stats.relative_norm or 0.0 for layer, stats in alignment.layers.items()}
    return {layer: norm / max(norms.values()) for layer, norm in norms.items()}


def main(output: Path) -> None:
    pl.seed_everything(0, verbose=False)
    module, data = CausalLMModule(str(INSTRUCT), learning_rate=1e-3), TextDataModule(str(ROWS), context_length=64)
    callback = LATACallback(output_dir=output / "lata")
    trainer = pl.Trainer(
        max_epochs=1, limit_train_batches=20, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback]
    )
    trainer.fit(module, datamodule=data)

    vector = TaskVector.open(output / "lata/task_vector")
    alignment = align(vector, TaskVector.between(str(BASE), str(INSTRUCT), kind="instruction"))
    own, linear = by_relative_norm(alignment), linear_drop_by_rank(alignment)
    for layer in own:
        print(f"{layer}: by relative norm {own[layer]:.3f}, linear {linear[layer]:.3f}")
    # The rule is recorded by its name; tensors outside the layers take `outside`.
    weighted = vector.weighted(alignment, by_relative_norm, outside=0.0)
    print(merge(str(INSTRUCT), [Term(weighted, scale=0.8)], output / "merged"))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "own-weighting-run"))
