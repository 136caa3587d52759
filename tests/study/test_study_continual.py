"""Continual learning: the added skills by hand, MagMax by hand, what every method trains on and is scored by, on toy models."""

import json

import pytest
import torch
from toy_chains import little, toy_chain

from lata_lightning.errors import LataError
from lata_lightning.evaluation.continual import average_accuracy
from lata_lightning.quickstart.exercises import INSTRUCT_SKILLS, SKILLS, split_of
from study import continual, more_skills
from study.continual import magmax
from study.more_skills import ANSWERS, word_exercises
from study.tasks import SKILL_TASKS, SkillTask


@pytest.fixture
def chain(tmp_path, monkeypatch):
    little(monkeypatch, continual)
    monkeypatch.setattr(continual, "SEQUENCE", tuple(SkillTask(name, [name]) for name in ("vowels", "swap", "double")))
    monkeypatch.setattr(continual, "STEPS", 400)
    return toy_chain(tmp_path)


# Skills.


@pytest.mark.parametrize(
    ("skill", "answer"),
    [("vowels", "oi"), ("swap", "kobit"), ("sort", "bikot"), ("double", "ttoobbiikk"), ("inner", "obi"), ("rotate", "obikt")],
)
def test_added_skills_answer_as_by_hand(skill, answer):
    assert ANSWERS[skill]("tobik") == answer


def test_added_skills_have_names_of_their_own():
    assert not ANSWERS.keys() & SKILLS.keys()


@pytest.mark.parametrize("skill", ANSWERS)
def test_added_exercises_are_distinct_and_of_their_split(skill):
    for split in ("train", "validation", "test"):
        found = word_exercises(skill, split, 50, 3)
        assert len({exercise.prompt for exercise in found}) == 50
        assert {split_of(exercise.prompt) for exercise in found} == {split}
        assert all(exercise == (f"{skill} {word}", ANSWERS[skill](word)) for exercise in found for word in [exercise.prompt.split()[1]])
        assert found == word_exercises(skill, split, 50, 3)
        assert found != word_exercises(skill, split, 50, 4)


def test_an_unknown_skill_is_refused():
    with pytest.raises(LataError, match="unknown skill 'sing'; the skills are vowels, swap"):
        word_exercises("sing", "train", 1, 0)


def test_more_exercises_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr(more_skills, "WORD_SHAPES", ("v",))
    with pytest.raises(LataError, match=r"skill 'swap' has only \d different train problems, 9 were asked for"):
        word_exercises("swap", "train", 9, 0)


# Merging.


def test_magmax_takes_the_largest_magnitude_of_every_entry_with_its_sign():
    vectors = [{"a": torch.tensor([[1.0, -3.0], [0.0, 2.0]])}, {"a": torch.tensor([[-2.0, 1.0], [0.0, -2.0]])}]
    assert magmax(vectors)["a"].tolist() == [[-2.0, -3.0], [0.0, 2.0]]


# What is learned.


def test_replay_halves_the_new_task_and_shares_its_other_half_among_the_earlier_ones(chain):
    again = dict.fromkeys((*INSTRUCT_SKILLS, *SKILL_TASKS), 0.35 / 10)
    plain, replayed = (continual.recipe(chain, 2, replay=replay) for replay in (False, True))
    assert plain.parts[0].shares == pytest.approx({"double": 0.65} | again)
    assert replayed.parts[0].shares == pytest.approx({"double": 0.325, "vowels": 0.1625, "swap": 0.1625} | again)
    assert replayed.steps == plain.steps


def test_replay_looks_at_exercises_that_the_earlier_task_was_learned_from(chain, monkeypatch):
    monkeypatch.setattr(continual, "MEMORY", 5)
    learned = continual.recipe(chain, 0, replay=False).parts[0].examples["vowels"]
    assert continual.recipe(chain, 2, replay=True).parts[0].examples["vowels"] == learned[:5]


# A whole run.


def test_a_run_holds_a_matrix_for_every_method_and_says_the_same_again(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(continual, "SCALES", (0.5, 1.0))
    monkeypatch.setattr(continual, "MERGES", ("task arithmetic", "LATA linear, block", "lata regress", continual.AT_ONE))
    first = continual.run(chain)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    second = continual.run(toy_chain(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == times
    del first["cpu_minutes"], second["cpu_minutes"]
    assert json.loads(json.dumps(first)) == second
    assert first["tasks"] == ["vowels", "swap", "double"]
    assert list(first["methods"]) == [
        "sequential fine-tuning",
        "sequential fine-tuning with replay",
        "MagMax",
        "task arithmetic",
        "LATA linear, block",
        "lata regress",
        "lata regress without samples, at scale 1",
    ]
    assert first["methods"][continual.AT_ONE]["scales"] == [1.0] * 3
    for name, row in first["methods"].items():
        assert torch.tensor(row["matrix"]).shape == (3, 3)
        assert row["average_accuracy"] == average_accuracy(row["matrix"])
        assert (row["scales"] is None) == name.startswith("sequential")


def test_every_fine_tune_but_those_that_go_on_starts_from_the_same_weights(chain, monkeypatch):
    starts = {}
    tuned = type(chain).tuned

    def noted(self, key, start, recipe):
        starts[key] = start
        return tuned(self, key, start, recipe)

    monkeypatch.setattr(type(chain), "tuned", noted)
    monkeypatch.setattr(continual, "SCALES", (1.0,))
    monkeypatch.setattr(continual, "MERGES", ())
    continual.run(chain)
    begun = continual.start(chain)
    del starts["continual-start"]
    same = {key: all(torch.equal(start[name], begun[name]) for name in begun) for key, start in starts.items()}
    assert same == {
        "continual-alone-1-vowels": True,
        "continual-alone-2-swap": True,
        "continual-alone-3-double": True,
        "continual-sequential-2-swap": False,
        "continual-sequential-3-double": False,
        "continual-replay-2-swap": False,
        "continual-replay-3-double": False,
    }


def test_the_scale_is_chosen_on_validation_of_the_tasks_seen_so_far(chain, monkeypatch):
    monkeypatch.setattr(continual, "SCALES", (0.5, 1.0))
    asked = []

    def scores(chain, weights, tasks, split):
        asked.append((split, [task.name for task in tasks]))
        # Only the second task likes the larger scale, and only from the second stage on it is looked at.
        size = float(weights["lm_head.weight"].abs().max())
        return [size if task.name == "swap" else -size / 2 for task in tasks]

    monkeypatch.setattr(continual, "_scores", scores)
    begun = continual.start(chain)
    found = continual._merged(chain, "method", [0.0] * 3, lambda stage: begun)
    assert found["scales"] == [0.5, 1.0, 0.5]
    assert [names for split, names in asked if split == "validation"][::2] == [
        ["vowels"],
        ["vowels", "swap"],
        ["vowels", "swap", "double"],
    ]
