"""Attention Matching of one KV head in float64 numpy, from the formulas of shared/policies-2.md S2: which tokens rank
best, and what becomes of biases and values. A head's tokens are numbered from 0 without padding; which of them stay is
the library's word.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass
class Token:
    key: Array
    value: Array
    bias: float = 0.0


@dataclass
class Head:
    """A KV head of one row, and what the policy says."""

    scale: float
    low: float = -3.0
    high: float = 3.0
    iters: int = 2
    ridge: float = 0.0
    fits_values: bool = True
    tokens: dict[int, Token] = field(default_factory=dict)

    def row(self, query: Array, number: int) -> tuple[list[int], Array]:
        """Which tokens a query of token `number` sees, and its logits."""
        seen = [n for n in sorted(self.tokens) if n <= number]
        return seen, np.array([self.scale * query @ self.tokens[n].key + self.tokens[n].bias for n in seen])

    def output(self, query: Array, number: int) -> Array:
        seen, logits = self.row(query, number)
        weights = np.exp(logits - logits.max())
        return sum(w * self.tokens[n].value for w, n in zip(weights / weights.sum(), seen, strict=True))

    def rms(self, queries: list[tuple[Array, int]]) -> dict[int, float]:
        """Root mean square of each token's probability over the queries that see it."""
        squares: dict[int, list[float]] = {n: [] for n in self.tokens}
        for query, number in queries:
            seen, logits = self.row(query, number)
            weights = np.exp(logits - logits.max())
            for n, p in zip(seen, weights / weights.sum(), strict=True):
                squares[n].append(p**2)
        return {n: float(np.sqrt(np.mean(found))) if found else 0.0 for n, found in squares.items()}

    def fit(self, queries: list[tuple[Array, int]], span: list[int], kept: list[int]) -> None:
        """The tokens `kept` of the `span` stand for all of it; protected ones are in neither."""
        masses, totals, outputs = [], [], []
        for query, number in queries:
            seen, logits = self.row(query, number)
            here = [i for i, n in enumerate(seen) if n in span]
            if not any(seen[i] in kept for i in here):
                continue
            power = {seen[i]: np.exp(logits[i] - logits[here].max()) for i in here}
            total = sum(power.values())
            masses.append([power.get(n, 0.0) for n in kept])
            totals.append(total)
            outputs.append(sum(p / total * self.tokens[n].value for n, p in power.items()))
        if not masses:
            return
        part, total = np.array(masses), np.array(totals)
        old = np.array([self.tokens[n].bias for n in kept])
        low, high = np.exp(self.low - old), np.exp(self.high - old)
        factor = np.clip(self.near(part, total[:, None], np.ones((len(kept), 1)))[:, 0], low, high)
        along = np.ones(len(kept))
        for _ in range(3):
            along = part.T @ part @ along
            along /= np.linalg.norm(along)
        steepest = np.linalg.norm(part @ along) ** 2
        for _ in range(self.iters):
            factor = np.clip(factor - part.T @ (part @ factor - total) / steepest, low, high)
        shares = part * factor
        shares /= shares.sum(1, keepdims=True)
        values = np.array([self.tokens[n].value for n in kept])
        if self.fits_values:
            values = self.near(shares, np.array(outputs), values)
        for n, bias, value in zip(kept, old + np.log(factor), values, strict=True):
            self.tokens[n].bias, self.tokens[n].value = float(bias), value

    def near(self, matrix: Array, wanted: Array, start: Array) -> Array:
        """The least-squares solution nearest to `start`: numpy's of least norm, of the difference, under a ridge."""
        cost = np.sqrt(max(self.ridge, 1e-8) * (matrix**2).sum() / matrix.shape[1])
        tall = np.vstack([matrix, cost * np.eye(matrix.shape[1])])
        off = np.vstack([wanted - matrix @ start, np.zeros_like(start)])
        return start + np.linalg.lstsq(tall, off, rcond=None)[0]
