"""Two tasks one after the other, by sequential fine-tuning and by merged task vectors: python examples/continual.py [OUTPUT [STEPS]]

A call that was broken off goes on where it was.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import AutoTokenizer

from lata_lightning import TaskVector
from lata_lightning.evaluation.accuracy import ExactMatch
from lata_lightning.quickstart.exercises import exercises
from lata_lightning.quickstart.experts import BASE, EXPERTS, INSTRUCT, fine_tune
from lata_lightning.training.continual import Learned, Task, learn_in_sequence


def task(name: str, steps: int) -> Task:
    """One expert of the quickstart as a task: how it is trained, and how it is scored on exercises it has not seen."""
    table = {name: replace(EXPERTS[name], epochs=1, batches_per_epoch=steps)}
    questions = [pair for skill in EXPERTS[name].skills for pair in exercises(skill, "validation", 60, seed=0)]
    return Task(name, lambda start: fine_tune(name, start, table), partial(score, questions), seed=EXPERTS[name].seed)


def score(questions: list[tuple[str, str]], model: object) -> float:
    return ExactMatch(AutoTokenizer.from_pretrained(INSTRUCT), questions)(model)


def show(title: str, learned: Learned) -> None:
    print(title)
    print(f"{'after':>12}  " + "  ".join(f"{name:>9}" for name in learned.tasks))
    for after, row in zip(("nothing", *learned.tasks), (learned.reference, *learned.accuracies), strict=True):
        print(f"{after:>12}  " + "  ".join(f"{value:>9.3f}" for value in row))
    print("  ".join(f"{name} {'–' if value is None else f'{value:.3f}'}" for name, value in learned.summary.items()), end="\n\n")


def main(output: Path, steps: int) -> None:
    # Arithmetic is harder to learn than reversing words, and gets twice the steps.
    tasks = [task("string", steps), task("math", 2 * steps)]
    instruction = TaskVector.between(BASE, INSTRUCT, kind="instruction")
    show("Each task learned from the model before it", learn_in_sequence(INSTRUCT, tasks, output / "sequential", rule="sequential"))
    # With weighting="linear", "log" or "threshold" the vectors are weighted by layer. Here they are not: the log says that the alignments are too flat.
    merged = learn_in_sequence(INSTRUCT, tasks, output / "merged", instruction_vector=instruction)
    show("Each task learned from instruct, all vectors merged", merged)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "continual-output"), int(sys.argv[2]) if len(sys.argv) > 2 else 80)
