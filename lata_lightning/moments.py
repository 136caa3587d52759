"""The three sums of a tensor from which every norm and cosine follows.

⟨τ, τ_instr⟩, ‖τ‖² and ‖τ_instr‖² of a tensor add up over tensors, layers and shards. So they are measured once, at tensor level
(``numerics/measure.py``); everything else is arithmetic on a small table and needs no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lata_lightning.errors import LataError

Start = Literal["instruct", "base"]
STARTS: tuple[Start, ...] = ("instruct", "base")


@dataclass(frozen=True)
class Moments:
    """Sums over the entries of one tensor or of many.

    Attributes:
        inner: ⟨τ, τ_instr⟩.
        task: ‖τ‖².
        instruction: ‖τ_instr‖²; 0 where no instruction vector is known.
    """

    inner: float = 0.0
    task: float = 0.0
    instruction: float = 0.0

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.inner + other.inner, self.task + other.task, self.instruction + other.instruction)

    @property
    def task_norm(self) -> float:
        """‖τ‖."""
        return math.sqrt(self.task)

    @property
    def instruction_norm(self) -> float:
        """‖τ_instr‖."""
        return math.sqrt(self.instruction)

    @property
    def relative_norm(self) -> float | None:
        """ρ = ‖τ‖ / ‖τ_instr‖; None where the instruction vector is zero."""
        return None if self.instruction == 0 else math.sqrt(self.task / self.instruction)

    @property
    def alignment(self) -> float | None:
        """cos(τ + τ_instr, τ_instr), in [-1, 1]; None where the instruction or the complex vector is zero.

        Source: LATA, arXiv:2502.20186, step 2, in terms of the three sums a, b and c: (a + c) / √((b + 2a + c)·c).
        """
        complex_squared = self.task + 2 * self.inner + self.instruction
        if self.instruction == 0 or complex_squared <= 0:
            return None
        if self.task == 0:
            # Nothing was learned: return exactly 1, so that such layers tie and are ranked in layer order, not by rounding errors.
            return 1.0
        cosine = (self.inner + self.instruction) / math.sqrt(complex_squared) / math.sqrt(self.instruction)
        return max(-1.0, min(1.0, cosine))


def total(moments: Iterable[Moments]) -> Moments:
    """Return the sum of moments, zero for an empty iterable. Each of the three sums is rounded once."""
    rows = list(moments)
    return Moments(*(math.fsum(getattr(row, field) for row in rows) for field in ("inner", "task", "instruction")))


def check_start(start: str) -> Start:
    """Return the kind of start itself.

    Raises:
        LataError: It is neither ``"instruct"`` nor ``"base"``.
    """
    if start not in STARTS:
        raise LataError(f"unknown start {start!r}; choose one of {', '.join(STARTS)}")
    return start
