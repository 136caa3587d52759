"""A chain of very small models and very little data, for tests of what is built on chains."""

import json
from pathlib import Path

from study import chain as chains
from study import tasks
from study.chain import Chain
from study.training import Shape

TOY = Shape(blocks=2, width=16, base_steps=3, instruct_steps=3, tuning=0.01)
TEXT = "def one():\n    return 1\n" * 40


def little(monkeypatch, *modules):
    """Make all data small; modules that hold the table of tasks get fresh ones, so that nothing prepared outlives a test."""
    monkeypatch.setattr(tasks, "TRAINING_EXERCISES", 40)
    monkeypatch.setattr(tasks, "TRAINING_EXERCISES_OF", {})
    monkeypatch.setattr(tasks, "PROBLEMS", {"validation": 6, "test": 8})
    monkeypatch.setattr(tasks, "INSTRUCT_PROBLEMS", {"validation": 1, "test": 2})
    monkeypatch.setattr(chains, "base_texts", lambda data: [TEXT])
    monkeypatch.setattr(chains, "self_instruct", lambda data: [("Say tea.", "tea"), ("Say milk.", "milk")])
    fresh = {
        name: tasks.SkillTask(name, task.skills) if isinstance(task, tasks.SkillTask) else type(task)(name)
        for name, task in tasks.TASKS.items()
    }
    for module in (tasks, chains, *modules):
        monkeypatch.setattr(module, "TASKS", fresh)
    return fresh


def toy_chain(work, seed=0):
    return Chain(work, seed, TOY)


def little_texts(folder: Path) -> Path:
    """A folder with a little of every data set, every row of it different."""
    for name in ("wikitext2", "gsm8k", "mbpp", "self_instruct", "books"):
        (folder / name).mkdir(parents=True)
    rows = [
        {"question": f"How many are {n} and {n} sheep of a shepherd of so many sheep?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"}
        for n in range(60)
    ]
    (folder / "gsm8k/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:40]))
    (folder / "gsm8k/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[40:]))
    code = [
        {"text": f"Write a function that adds {n}.", "code": f"def add(x):\r\n    # {'long ' * 30}\r\n    return x + {n}\r\n"}
        for n in range(40)
    ]
    (folder / "mbpp/mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in code))
    (folder / "wikitext2/valid.txt").write_text("".join(f"The {n}th valid line of the text .\n" for n in range(200)))
    (folder / "wikitext2/test.txt").write_text("".join(f"The {n}th test line of the text .\n" for n in range(200)))
    instance = {"instruction": "Say it.", "instances": [{"input": "tea", "output": "tea"}, {"input": "", "output": ""}]}
    (folder / "self_instruct/seed_tasks.jsonl").write_text(json.dumps(instance) + "\n")
    (folder / "books/one.txt").write_text("It was the best of times. " * 100)
    return folder
