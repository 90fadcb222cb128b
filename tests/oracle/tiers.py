"""A cache that demotes: no token goes, and the simulator's choices say which are whole; the others are read as codes.

What a policy would evict is never chosen again. All tokens are seen by all later queries, and have their statistics.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from oracle.coded import CodedSimulator
from oracle.codes import decoded, encoded
from torch import Tensor


class TieredSimulator(CodedSimulator):
    """`holds` of a head: its whole tokens."""

    def whole(self, index: int, heads: int, new: int) -> Tensor:
        out = torch.zeros(len(self.valid), heads, len(self.valid[0]), dtype=torch.bool)
        out[..., -new:] = True
        for b, row in enumerate(self.layers[index].heads if index in self.layers else []):
            for h, head in enumerate(row):
                out[b, h, : len(head.holds)] = torch.from_numpy(head.holds)
        return out

    def visible(self, index: int, sees: Tensor) -> Tensor:
        there = torch.zeros(len(sees), sees.shape[-1], dtype=torch.bool)
        for row, valid in zip(there, self.layers[index].valid, strict=True):
            row[valid] = True
        return sees & there[:, None, None]

    def observe(self, index: int, b: int, h: int, *seen: Tensor) -> None:
        with_all(self, index, b, h, lambda: super(TieredSimulator, self).observe(index, b, h, *seen))

    def look(self, index: int, b: int, h: int, *seen: Tensor) -> None:
        with_all(self, index, b, h, lambda: super(TieredSimulator, self).look(index, b, h, *seen))


def with_all(simulator: TieredSimulator, index: int, b: int, h: int, run: Any) -> None:
    """Let a policy look at all tokens, whole or not."""
    layer = simulator.layers[index]
    head = layer.heads[b][h]
    own = head.holds
    head.holds = np.zeros_like(own)
    head.holds[layer.valid[b]] = True
    run()
    head.holds = own


Vector = list[float]


class PlainMiKV:
    """MiKV (arXiv 2402.18096) for one query head in lists and loops, without a balancer: of S tokens the share * S that
    are newest or got most attention are whole, half of them the newest; the others are codes, for good.
    """

    def __init__(self, share: float, name: str, group: int) -> None:
        self.share, self.name, self.group = share, name, group
        self.keys: list[Vector] = []
        self.values: list[Vector] = []
        self.sums: list[float] = []
        self.whole: set[int] = set()

    def read(self, x: list[Vector], token: int) -> Vector:
        if token in self.whole:
            return x[token]
        return decoded(encoded(x[token], self.name, self.group), self.name, self.group)

    def call(self, queries: list[Vector], keys: list[Vector], values: list[Vector]) -> list[Vector]:
        """Attention of new tokens to all before them; then what is too much is demoted."""
        first = len(self.keys)
        self.keys, self.values = self.keys + keys, self.values + values
        self.sums += [0.0] * len(keys)
        self.whole |= set(range(first, len(self.keys)))
        outs = []
        for at, query in enumerate(queries):
            seen = range(first + at + 1)
            logits = [sum(a * b for a, b in zip(query, self.read(self.keys, n), strict=True)) for n in seen]
            powers = [math.exp(logit / math.sqrt(len(query))) for logit in logits]
            probs = [power / sum(powers) for power in powers]
            for n, p in zip(seen, probs, strict=True):
                self.sums[n] += p
            read = [self.read(self.values, n) for n in seen]
            outs.append([sum(p * v[i] for p, v in zip(probs, read, strict=True)) for i in range(len(values[0]))])
        tokens = len(self.keys)
        most = max(1, int(self.share * tokens + 1e-9))
        safe = {n for n in self.whole if n >= tokens - most // 2}
        others = sorted(self.whole - safe, key=lambda n: (-self.sums[n], n))
        self.whole = safe | set(others[: most - len(safe)])
        return outs
