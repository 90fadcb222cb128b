"""How sure a mean over few windows is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t for 1, 2, ... degrees of freedom, 95 %; for more, the last is on the safe side."""


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % t interval of a mean; infinite for one value."""
    if len(values) < 2:
        return math.inf
    return T95[min(len(values) - 1, len(T95)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
