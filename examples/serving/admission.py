"""Bytes: which requests fit beside each other, known before anything is computed.

`kvpass.Cache.bounds` says what a cache can hold at most. A batch is rectangular: every row as large as its largest. And
for moments there is more than the batch: a prompt holds its keys and values until they are evicted; rows that join or
leave are copied (`merge`, `select`), so that the old batch and the new one are there. All of it is in the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Need:
    """What a request will feed: numbers of tokens of calls of several, and of those one by one behind them."""

    calls: tuple[int, ...]
    steps: int


class Admission:
    """
    Args:
        bounds: of caches of the model.
        budget: bytes that all caches may hold together at any moment.
        base: bytes of them that are always held.
    """

    def __init__(self, bounds: Any, budget: int, base: int) -> None:
        self.bounds, self.budget, self.base = bounds, budget, base

    def alone(self, new: Need) -> int:
        """Bytes at most while there is nobody else: what a request needs to be served at all."""
        return self.base + int(self.bounds.peak(new.calls, new.steps))

    def together(self, running: Sequence[Need], new: Need) -> int:
        """Bytes at most from its prompt on, beside those that run already, until the first of them leaves."""
        if not running:
            return self.alone(new)
        prompt = self._batch(running) + int(self.bounds.peak(new.calls))
        return self.base + max(prompt, self._changing([*running, new]))

    def can_ever(self, new: Need) -> bool:
        return self.alone(new) <= self.budget

    def can_now(self, running: Sequence[Need], new: Need) -> bool:
        return self.together(running, new) <= self.budget

    def _batch(self, rows: Sequence[Need]) -> int:
        return max(int(self.bounds.held(row.calls, row.steps, len(rows))) for row in rows)

    def _changing(self, rows: Sequence[Need]) -> int:
        """While rows join, leave or grow: both batches, and a layer on its way."""
        layer = max(int(self.bounds.layer(row.calls, row.steps, len(rows))) for row in rows)
        return 2 * self._batch(rows) + layer
