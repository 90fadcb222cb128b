"""Figures as words of a table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from quality import stats


def percent(value: float) -> str:
    return f"{100 * value:.0f}"


def share_cell(found: list[dict[str, Any]]) -> str:
    right = sum(entry["right"] for entry in found)
    _, low, high = stats.wilson(right, len(found))
    return f"{right}/{len(found)} [{percent(low)}-{percent(high)}]"


def spread(values: list[float], digits: int, scale: float = 1.0) -> str:
    middle, low, high = stats.mean([scale * value for value in values])
    return f"{middle:.{digits}f}" if math.isnan(low) else f"{middle:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def held(cell: dict[str, Any]) -> float:
    """K and V held, of the dense cache."""
    return float(cell["held"]["bytes"] / cell["held"]["dense_bytes"])


def table(columns: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
