"""More generated skills, so that a sequence of tasks is long enough: every answer is made of the letters of one made-up word."""

from __future__ import annotations

import random
from collections.abc import Callable

from lata_lightning.errors import LataError
from lata_lightning.quickstart.exercises import CONSONANTS, MAX_TRIES_PER_EXERCISE, VOWELS, WORD_SHAPES, Exercise, Split, split_of


def _vowels(word: str) -> str:
    return "".join(letter for letter in word if letter in VOWELS)


def _swap(word: str) -> str:
    return word[-1] + word[1:-1] + word[0]


def _sort(word: str) -> str:
    return "".join(sorted(word))


def _double(word: str) -> str:
    return "".join(letter * 2 for letter in word)


def _inner(word: str) -> str:
    return word[1:-1]


def _rotate(word: str) -> str:
    return word[1:] + word[0]


ANSWERS: dict[str, Callable[[str], str]] = {
    "vowels": _vowels,
    "swap": _swap,
    "sort": _sort,
    "double": _double,
    "inner": _inner,
    "rotate": _rotate,
}


def word_exercises(skill: str, split: Split, count: int, seed: int) -> list[Exercise]:
    """Distinct exercises of one skill and one split, as ``quickstart.exercises`` draws those of its skills.

    Args:
        skill: A key of ``ANSWERS``.
        split: Part of all problems; the prompt alone decides which one it belongs to.
        count: How many, at least 1.
        seed: Same seed, same list; it never moves a problem to another split.

    Returns:
        ``count`` exercises with pairwise different prompts, in random order.

    Raises:
        LataError: The skill is unknown, or does not have so many problems.
    """
    if skill not in ANSWERS:
        raise LataError(f"unknown skill {skill!r}; the skills are {', '.join(ANSWERS)}")
    rng = random.Random(f"{skill}/{split}/{seed}")
    found: dict[str, Exercise] = {}
    for _ in range(count * MAX_TRIES_PER_EXERCISE):
        word = "".join(rng.choice(CONSONANTS if letter == "c" else VOWELS) for letter in rng.choice(WORD_SHAPES))
        prompt = f"{skill} {word}"
        if split_of(prompt) == split:
            found[prompt] = Exercise(prompt, ANSWERS[skill](word))
            if len(found) == count:
                return list(found.values())
    raise LataError(f"skill {skill!r} has only {len(found)} different {split} problems, {count} were asked for; ask for fewer")
