"""What neighbouring tokens share: pooling, and granules that stay or go together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def pooled(values: Array, outside: Array, kind: str, size: int) -> Array:
    """Over `size` neighbours outside the window; tokens of the window keep theirs and lend nothing. An average counts
    what is missing at the ends as zeros."""
    half, lent = size // 2, np.where(outside, values, 0)
    padded = np.concatenate([np.zeros(half), lent, np.zeros(half)])
    reduced = [padded[i : i + size].max() if kind == "max" else padded[i : i + size].mean() for i in range(len(values))]
    return np.where(outside, reduced, values)


def granules(values: Array, positions: Array, outside: Array, first: int, size: int, by: Callable[[Array], float]):
    """Every token outside the window gets its granule's value; granules are counted from position `first`."""
    out = values.copy()
    for number in np.unique((positions[outside] - first) // size):
        members = outside & ((positions - first) // size == number)
        out[members] = by(values[members])
    return out


def top_half(values: Array) -> float:
    """Mean of the better half, rounded up."""
    return float(np.mean(np.sort(values)[::-1][: (len(values) + 1) // 2]))
