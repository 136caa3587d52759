"""The settings in which merging is compared: track × protocol × experts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from benchmarks.methods.chain import Start
from benchmarks.methods.tasks import SKILL_TASKS, TEXT_TASKS

Track = Literal["skills", "text"]
TASKS_OF: dict[Track, tuple[str, ...]] = {"skills": SKILL_TASKS, "text": TEXT_TASKS}
PAIR_OF: dict[Track, tuple[str, str]] = {"skills": ("compute", "sort"), "text": ("wikitext2", "gsm8k")}
"""The pair that is merged unless others are asked for. On development seed 100 task arithmetic keeps 68 % of what these two skills gain, and 83 and 88 %
of the other pairs; all pairs of text lie between 74 and 77 %."""


@dataclass(frozen=True)
class Setting:
    """What is merged.

    Attributes:
        track: ``"skills"`` or ``"text"``.
        protocol: What the experts were tuned from.
        experts: Names of their tasks.
    """

    track: Track
    protocol: Start
    experts: tuple[str, ...]

    @property
    def name(self) -> str:
        """As in ``--settings`` and in file names."""
        return f"{self.track}-{self.protocol}-{'+'.join(self.experts)}"


def settings(all_pairs: bool = False) -> list[Setting]:
    """The triple of every track and protocol, and one pair of each, or all of them; triples first.

    Of skills that were learned from base no pair is merged unless it is asked for: on development seed 100 task arithmetic keeps 6 % of the triple's gain
    and 1 % of a pair's, so that nothing can be told there, and the triple is enough to show it.
    """
    kinds: list[tuple[Track, Start]] = [(track, protocol) for track in TASKS_OF for protocol in ("instruct", "base")]
    triples = [Setting(track, protocol, TASKS_OF[track]) for track, protocol in kinds]
    if all_pairs:
        pairs = [Setting(track, protocol, pair) for track, protocol in kinds for pair in combinations(TASKS_OF[track], 2)]
    else:
        pairs = [Setting(track, protocol, PAIR_OF[track]) for track, protocol in kinds if (track, protocol) != ("skills", "base")]
    return [*triples, *pairs]
