"""Generated exercises with one right answer each, for training and scoring in the quickstart.

Prompts are lower-case words such as ``reverse tobik``; answers are a few characters. Words are made-up syllables; nothing comes from a data set. The
prompt decides to which split an exercise belongs, so a test exercise is never trained on, whatever the seed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Literal, NamedTuple

from lata_lightning.errors import LataError, first_three

Split = Literal["train", "validation", "test"]

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
WORD_SHAPES = ("cvc", "vcv", "cvcv", "vcvc", "cvcvc")
# Split by the hash of a prompt modulo 20; of the smallest skill's 1 620 problems, validation and test must hold 250 and 400.
SPLIT_RESIDUES: dict[str, range] = {"train": range(10), "validation": range(10, 14), "test": range(14, 20)}
MAX_TRIES_PER_EXERCISE = 200


class Exercise(NamedTuple):
    """A question and its one right answer."""

    prompt: str
    answer: str


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(CONSONANTS if letter == "c" else VOWELS) for letter in rng.choice(WORD_SHAPES))


def _copy(rng: random.Random) -> Exercise:
    word = _word(rng)
    return Exercise(f"copy {word}", word)


def _upper(rng: random.Random) -> Exercise:
    word = _word(rng)
    return Exercise(f"upper {word}", word.upper())


def _first(rng: random.Random) -> Exercise:
    word = _word(rng)
    return Exercise(f"first {word}", word[0])


def _last(rng: random.Random) -> Exercise:
    word = _word(rng)
    return Exercise(f"last {word}", word[-1])


def _twice(rng: random.Random) -> Exercise:
    word = _word(rng)
    return Exercise(f"twice {word}", f"{word} {word}")


def _next(rng: random.Random) -> Exercise:
    number = rng.randrange(10 ** rng.randint(2, 4))
    return Exercise(f"next {number}", str(number + 1))


def _larger(rng: random.Random) -> Exercise:
    first, second = rng.sample(range(100), 2)
    return Exercise(f"larger {first} {second}", str(max(first, second)))


def _compute(rng: random.Random) -> Exercise:
    number, digit = rng.randrange(10, 100), rng.randrange(1, 10)
    if rng.random() < 0.5:
        return Exercise(f"compute {number}+{digit}", str(number + digit))
    return Exercise(f"compute {number}-{digit}", str(number - digit))


def _reverse(rng: random.Random) -> Exercise:
    word = _word(rng)
    return Exercise(f"reverse {word}", word[::-1])


def _encode(rng: random.Random) -> Exercise:
    word = _word(rng)
    return Exercise(f"encode {word}", "".join(chr((ord(letter) - ord("a") + 1) % 26 + ord("a")) for letter in word))


INSTRUCT_SKILLS = ("copy", "upper", "first", "last", "twice", "next", "larger")
MATH_SKILL = "compute"
STRING_SKILL = "reverse"
UNWANTED_SKILL = "encode"
SKILLS: dict[str, Callable[[random.Random], Exercise]] = {
    "copy": _copy,
    "upper": _upper,
    "first": _first,
    "last": _last,
    "twice": _twice,
    "next": _next,
    "larger": _larger,
    "compute": _compute,
    "reverse": _reverse,
    "encode": _encode,
}


def split_of(prompt: str) -> Split:
    """Return the split of a problem, which its prompt alone decides.

    Args:
        prompt: The question.

    Returns:
        ``"train"`` for half of all prompts, ``"validation"`` for a fifth, ``"test"`` for the rest; the same on every machine.
    """
    residue = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 20
    if residue in SPLIT_RESIDUES["train"]:
        return "train"
    return "validation" if residue in SPLIT_RESIDUES["validation"] else "test"


def exercises(skill: str, split: Split, count: int, seed: int) -> list[Exercise]:
    """Generate distinct exercises of one skill and one split.

    Args:
        skill: A key of ``SKILLS``.
        split: The split to draw from; splits share no prompt.
        count: Number of exercises, at least 1.
        seed: The same seed gives the same list; it never moves a problem to another split.

    Returns:
        ``count`` exercises with pairwise different prompts, in random order.

    Raises:
        LataError: The skill or the split is unknown, ``count`` is not positive, or the skill has fewer problems.
    """
    if skill not in SKILLS:
        raise LataError(f"unknown skill {skill!r}; the skills are {', '.join(SKILLS)}")
    if split not in SPLIT_RESIDUES:
        raise LataError(f"unknown split {split!r}; the splits are {', '.join(SPLIT_RESIDUES)}")
    if count < 1:
        raise LataError(f"count must be at least 1, not {count}")
    rng = random.Random(f"{skill}/{split}/{seed}")
    drawn: dict[str, Exercise] = {}
    for _ in range(count * MAX_TRIES_PER_EXERCISE):
        exercise = SKILLS[skill](rng)
        if split_of(exercise.prompt) == split:
            drawn[exercise.prompt] = exercise
            if len(drawn) == count:
                return list(drawn.values())
    raise LataError(
        f"skill {skill!r} has only {len(drawn)} different {split} problems, {count} were asked for, "
        f"first found {first_three(drawn)}; ask for fewer"
    )
