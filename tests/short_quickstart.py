"""The quickstart with very short fine-tunes, few problems and few scales: seconds instead of minutes."""

from dataclasses import replace

from lata_lightning.quickstart import experts, job, scoring
from lata_lightning.quickstart.experts import EXPERTS

SHORT = {name: replace(expert, epochs=2, batches_per_epoch=2) for name, expert in EXPERTS.items()}


def small(patch):
    patch.setattr(job, "MERGE_SCALES", (0.5, 1.0))
    patch.setattr(job, "FORGET_SCALES", (0.0, 1.0))
    patch.setattr(scoring, "SIZES", {"validation": scoring.Size(10, 3), "test": scoring.Size(12, 2)})
    patch.setattr(scoring, "_PERPLEXITY_TOKENS", 1024)
    patch.setattr(experts, "TRAIN_EXERCISES_PER_SKILL", 60)
    patch.setattr(experts, "EXPERT_EXERCISES_BY_SKILL", {})
