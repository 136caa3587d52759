"""A chain of very small models and very little data, for tests of what is built on chains."""

from benchmarks.methods import chain as chains
from benchmarks.methods import tasks
from benchmarks.methods.chain import Chain, Shape

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
    fresh = {name: tasks.SkillTask(name, task.skills) if isinstance(task, tasks.SkillTask) else task for name, task in tasks.TASKS.items()}
    for module in (tasks, chains, *modules):
        monkeypatch.setattr(module, "TASKS", fresh)
    return fresh


def toy_chain(work, seed=0):
    return Chain(work, seed, TOY)
