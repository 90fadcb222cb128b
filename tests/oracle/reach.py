"""The policy kvpass: heads share by how far they look, and rank their keys by how unlike the others they are."""

from __future__ import annotations

import numpy as np
from oracle.base import Row, Sight
from oracle.held import KeyDiff
from oracle.windowed import Window

Array = np.ndarray


class Reach(Window):
    """One ranking over all layers and heads."""

    spread = "model"
    voting = shortest = 64
    sinks, window = 4, 0
    near = 128
    sharp, heard = 2, 0.5

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return np.asarray((positions < row.first + self.sinks) | (positions >= row.end - n * 10 // 100))

    def measure(self, sight: Sight) -> tuple[Array, Array, Array]:
        c, row = sight.candidates, sight.row
        unlike, slack, _ = KeyDiff().measure(sight)
        rows = sight.rows[:, sight.voters(self.voting)][:, :, c]
        far = [j for j, at in enumerate(c) if row.first + self.sinks <= at < row.end - self.near]
        mean = float(np.mean([rows[:, :, j].max() for j in far])) ** self.sharp if far else 1.0
        heard = rows.mean((0, 1))
        parts = [between(unlike, slack), between(heard, sight.rounding * heard)]
        place, least, most = (np.minimum(one, (two + 0.5) / self.heard) for one, two in zip(*parts, strict=True))
        order, _, _ = between(-place, np.zeros(len(c)))
        score = mean / (1 + order)
        error = sight.rounding * score
        if (least != most).any():
            surely = (most[None] < least[:, None]).sum(1)
            perhaps = (least[None] <= most[:, None]).sum(1) - 1
            error += mean / (1 + surely) - mean / (1 + perhaps)
        return score, error, np.zeros(len(c))


def between(values: Array, slack: Array) -> tuple[Array, Array, Array]:
    """How many are larger, of equal ones those before; and the least and the most that float32 may find."""
    before = np.tri(len(values), k=-1, dtype=bool)  # [a, b]: b comes before a
    above = (values[None] > values[:, None]) | ((values[None] == values[:, None]) & before)
    near = np.abs(values[:, None] - values[None]) <= slack[:, None] + slack[None]
    equal = values[:, None] == values[None]  # the same number, or one that was copied
    doubt = near & ~equal
    larger = above.sum(1).astype(float)
    return larger, larger - (doubt & above).sum(1), larger + (doubt & ~above).sum(1)
