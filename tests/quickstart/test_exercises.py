import random

import pytest

from lata_lightning.errors import LataError
from lata_lightning.quickstart.exercises import INSTRUCT_SKILLS, SKILLS, exercises, split_of

ANSWERS = {
    "copy tobik": "tobik",
    "upper tobik": "TOBIK",
    "first tobik": "t",
    "last tobik": "k",
    "twice tob": "tob tob",
    "next 199": "200",
    "larger 7 12": "12",
    "compute 47+5": "52",
    "compute 50-5": "45",
    "reverse tobik": "kibot",
    "encode zab": "abc",
}


def solve(prompt):
    """The right answer, worked out from the prompt in another way than the generators do."""
    skill, _, rest = prompt.partition(" ")
    if skill == "compute":
        return str(eval(rest, {}))  # noqa: S307
    return {
        "copy": lambda: rest,
        "upper": lambda: rest.swapcase(),
        "first": lambda: rest[:1],
        "last": lambda: rest[-1:],
        "twice": lambda: " ".join([rest] * 2),
        "next": lambda: str(int(rest) + 1),
        "larger": lambda: max(rest.split(), key=int),
        "reverse": lambda: "".join(reversed(rest)),
        "encode": lambda: rest.translate(str.maketrans("abcdefghijklmnopqrstuvwxyz", "bcdefghijklmnopqrstuvwxyza")),
    }[skill]()


@pytest.mark.parametrize(("prompt", "answer"), ANSWERS.items())
def test_the_independent_solver_gives_the_answers_worked_by_hand(prompt, answer):
    assert solve(prompt) == answer


@pytest.mark.parametrize("skill", SKILLS)
def test_every_answer_is_right(skill):
    rng = random.Random(0)
    for _ in range(500):
        prompt, answer = SKILLS[skill](rng)
        assert prompt.startswith(skill + " ")
        assert answer == solve(prompt)


@pytest.mark.parametrize("skill", SKILLS)
def test_every_skill_has_250_validation_and_400_test_problems_and_all_are_different(skill):
    validation, test = exercises(skill, "validation", 250, seed=0), exercises(skill, "test", 400, seed=0)
    assert len({exercise.prompt for exercise in validation}) == 250
    assert len({exercise.prompt for exercise in test}) == 400


@pytest.mark.parametrize("skill", SKILLS)
def test_no_seed_moves_a_problem_from_one_split_to_another(skill):
    train = {exercise.prompt for exercise in exercises(skill, "train", 600, seed=1)}
    validation = {exercise.prompt for exercise in exercises(skill, "validation", 250, seed=2)}
    test = {exercise.prompt for exercise in exercises(skill, "test", 400, seed=3)}
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_a_split_is_decided_by_the_first_eight_bytes_of_the_sha256_of_the_prompt():
    # `printf 'copy tobik' | sha256sum` starts with 5d52985a1194cf42, which is 6724604706227015490: its rest by 20 is
    # 10.
    assert split_of("copy tobik") == "validation"


def test_the_same_seed_gives_the_same_exercises_and_another_seed_gives_others():
    assert exercises("reverse", "train", 50, seed=7) == exercises("reverse", "train", 50, seed=7)
    assert exercises("reverse", "train", 50, seed=7) != exercises("reverse", "train", 50, seed=8)


def test_the_instruct_skills_are_skills_and_hold_none_of_the_experts_skills():
    assert set(INSTRUCT_SKILLS) == set(SKILLS) - {"compute", "reverse", "encode"}


def test_an_unknown_skill_is_refused_with_the_list_of_skills():
    with pytest.raises(LataError, match=r"unknown skill 'sing'; the skills are copy, upper"):
        exercises("sing", "train", 1, seed=0)


def test_an_unknown_split_is_refused_with_the_list_of_splits():
    with pytest.raises(LataError, match=r"unknown split 'dev'; the splits are train, validation, test"):
        exercises("copy", "dev", 1, seed=0)


def test_a_count_below_one_is_refused():
    with pytest.raises(LataError, match="at least 1, not 0"):
        exercises("copy", "train", 0, seed=0)


def test_more_problems_than_there_are_is_refused_rather_than_repeated():
    with pytest.raises(LataError, match=r"'compute' has only \d+ different validation problems, 1000 were asked for"):
        exercises("compute", "validation", 1000, seed=0)
