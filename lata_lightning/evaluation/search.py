"""Searching for the best scale: first coarsely over the whole range, then finely around the best."""

from __future__ import annotations

from collections.abc import Callable

from lata_lightning.evaluation.scales import best_scale

COARSE = (0.1, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0)
"""From a small effect of a vector up to where merges usually break down."""
ROUNDS = 2
"""Number of times the gaps on both sides of the best scale are halved."""
PATIENCE = 2
"""The coarse search ends after so many scales in a row that are worse than the best."""
MOST_POINTS = len(COARSE) + 2 * ROUNDS
"""Largest number of scales above 0 that are scored."""


def coarse_to_fine(height_at: Callable[[float], float], start: float, first: float = COARSE[0]) -> dict[float, float]:
    """Score scales until the best one is known to a fraction of itself.

    The scales of ``COARSE`` from the first one on are scored in ascending order until ``PATIENCE`` in a row are worse than the best so far, the start
    included; then those below the first in descending order, likewise. Then the gaps on both sides of the best scale are halved, ``ROUNDS`` times. If all
    scores are equal, nothing is refined. The search is deterministic.

    Args:
        height_at: Returns the score at a scale, higher is better; minus infinity where a scale is not allowed.
        start: Score at scale 0.
        first: The scale of ``COARSE`` to begin with: where the best one is expected.

    Returns:
        The score of every scale that was scored, including 0.
    """
    heights = {0.0: start}
    begin = COARSE.index(first)
    for direction in (COARSE[begin:], COARSE[:begin][::-1]):
        worse = 0
        for scale in direction:
            heights[scale] = height_at(scale)
            worse = worse + 1 if heights[scale] < max(heights.values()) else 0
            if worse == PATIENCE:
                break
    for _ in range(ROUNDS if len(set(heights.values())) > 1 else 0):
        best = best_scale(heights)
        below = max((scale for scale in heights if scale < best), default=None)
        above = min((scale for scale in heights if scale > best), default=None)
        for side in (below, above):
            if side is not None:
                middle = round((best + side) / 2, 6)
                heights[middle] = height_at(middle)
    return heights
