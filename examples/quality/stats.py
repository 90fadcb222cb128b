"""Intervals of 95 %, wide where there are few trials."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from kvpass.tune.interval import T95

Z = 1.959964

Interval = tuple[float, float, float]
"""Value, lower and upper end."""


def wilson(successes: int, trials: int) -> Interval:
    """A share and its Wilson score interval."""
    if trials == 0:
        return math.nan, 0.0, 1.0
    share, z2 = successes / trials, Z * Z
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    return share, max(0.0, middle - half), min(1.0, middle + half)


def mean(values: Sequence[float]) -> Interval:
    """The mean over texts and its t interval. Steps within one text depend on each other: give one value per text."""
    middle = statistics.fmean(values)
    if len(values) < 2:
        return middle, math.nan, math.nan
    freedom = len(values) - 1
    t = T95[freedom - 1] if freedom <= len(T95) else Z * (1 + 1.25 / freedom)  # beyond the table close enough
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return middle, middle - half, middle + half
