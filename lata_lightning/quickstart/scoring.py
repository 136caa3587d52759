"""Scoring a model in the quickstart: math, string, instruct and unwanted skills, and perplexity of raw text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lata_lightning.evaluation.accuracy import ExactMatch
from lata_lightning.evaluation.perplexity import Perplexity
from lata_lightning.quickstart.corpus import held_out_text
from lata_lightning.quickstart.exercises import INSTRUCT_SKILLS, MATH_SKILL, STRING_SKILL, UNWANTED_SKILL, Split, exercises

GROUPS: Mapping[str, tuple[str, ...]] = {
    "math": (MATH_SKILL,),
    "string": (STRING_SKILL,),
    "instruct": INSTRUCT_SKILLS,
    "unwanted": (UNWANTED_SKILL,),
}
PERPLEXITY = "perplexity"
_PERPLEXITY_TOKENS = 16_384
_SEED = 0


@dataclass(frozen=True)
class Size:
    """Number of problems in a split: of an expert's skill, and of each instruct skill."""

    expert: int
    instruct: int


SIZES: Mapping[Split, Size] = {"validation": Size(200, 40), "test": Size(400, 60)}


class Scoring:
    """Scores models on one split, prepared once for many models.

    Args:
        tokenizer: Tokenizer of the models.
        split: ``validation`` to choose by, ``test`` to report.

    Attributes:
        exercises: The exercises of each group of skills.
    """

    def __init__(self, tokenizer: Any, split: Split) -> None:
        self.exercises = {
            group: [exercise for skill in skills for exercise in exercises(skill, split, _size(split, group), _SEED)]
            for group, skills in GROUPS.items()
        }
        self._matches = {group: ExactMatch(tokenizer, problems) for group, problems in self.exercises.items()}
        self._perplexity = Perplexity(tokenizer, held_out_text(), max_tokens=_PERPLEXITY_TOKENS)

    def __call__(self, model: Any, groups: Sequence[str] = (*GROUPS, PERPLEXITY)) -> dict[str, float]:
        """Return exact match in [0, 1] by group of skills, and perplexity per byte of text that no model was trained on."""
        return {group: self._perplexity(model) if group == PERPLEXITY else self._matches[group](model) for group in groups}


def mean(scores: Mapping[str, float], groups: Sequence[str]) -> float:
    """Return the mean of some scores."""
    return sum(scores[group] for group in groups) / len(groups)


def _size(split: Split, group: str) -> int:
    return SIZES[split].instruct if group == "instruct" else SIZES[split].expert
