"""Policies whose scores are given at the end of a call of several tokens, and held: geometry, chance, redundancy.

A token that is generated later is scored by itself where that is possible (`pointwise`); else it ranks above all
scored ones, by its position. So do the tokens of the observation window: it is kept whole, nobody scores it.
"""

from __future__ import annotations

import numpy as np
from oracle.base import Memory, Policy, Row, Sight
from oracle.smooth import pooled

Array = np.ndarray

GENERATED = 1e9
"""Above every score."""


class Held(Policy):
    needs = True
    pointwise = False
    geometric = False  # keys and values say all: judged again when steps that waited are over
    window = 0

    def measure(self, sight: Sight) -> tuple[Array, Array, Array]:
        """(score, float32's error, blurred) of all candidates."""
        raise NotImplementedError

    def look(self, memory: Memory, sight: Sight) -> None:
        row = sight.row
        if row.before and row.seen - row.before < self.shortest:
            self.leave_out(memory, sight.candidates[sight.candidates >= row.before])
        elif sight.multi or self.pointwise or (self.geometric and sight.due):
            c = sight.candidates
            memory.held[c], memory.error[c], memory.blurred[c] = self.measure(sight)
            self.leave_out(memory, c[~sight.outside(self.window)])
        elif sight.row.valid[0]:
            self.leave_out(memory, sight.candidates[-1:])

    def leave_out(self, memory: Memory, positions: Array) -> None:
        memory.held[positions] = GENERATED + positions
        memory.error[positions] = memory.blurred[positions] = 0

    def score(self, memory: Memory) -> Array:
        return memory.held

    def error(self, memory: Memory, rounding: float) -> Array | None:
        return memory.error


def clear(score: Array, error: Array) -> tuple[Array, Array, Array]:
    return score, error, np.zeros(len(score))


class Knorm(Held):
    """Small keys stay, and the last 32."""

    pointwise = True
    recent = 32

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return np.asarray(positions >= row.end - self.recent)

    def measure(self, sight: Sight) -> tuple[Array, Array, Array]:
        norm = np.sqrt((sight.keys[sight.candidates] ** 2).sum(-1))
        return clear(-norm, sight.rounding * norm)


class KeyDiff(Held):
    """Keys that are unlike the mean direction of all stay."""

    geometric = True

    def measure(self, sight: Sight) -> tuple[Array, Array, Array]:
        unit = directions(sight.keys[sight.candidates])
        mean = unit.mean(0)
        score = -(unit @ mean) / np.linalg.norm(mean)
        return clear(score, np.full(len(score), sight.rounding))


def directions(keys: Array) -> Array:
    return keys / np.linalg.norm(keys, axis=-1, keepdims=True)


def uniform(sight: Sight, seed: int = 0, salt: int = 0, head: int | None = None, more: int = 0) -> Array:
    """The numbers of kvpass.kernels.rank.scorers.chance for all candidates, in Python's integers."""
    numbers, head = [], sight.head if head is None else head
    for position in sight.candidates:
        x = int(position) - int(sight.row.first)
        x += 0x9E3779B1 * (head + 1) + 0x85EBCA77 * (sight.layer + 1) + 0xC2B2AE3D * (seed + salt + 1) + more
        x &= 0xFFFFFFFF
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        numbers.append(((x >> 9) + 0.5) / 2**23)
    return np.array(numbers, dtype=float)


class Random(Held):
    pointwise = True

    def measure(self, sight: Sight) -> tuple[Array, Array, Array]:
        score = uniform(sight)
        return clear(score, np.zeros(len(score)))


class LagKV(Held):
    """4 sinks, then blocks of 128, each measured against the next one; ranks within a block. As kvpress: the last
    full block and the tail stay; where they alone are more than the budget, the later ones stay."""

    geometric = True
    lag = 128
    sinks = 4

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return positions < row.first + self.sinks

    def measure(self, sight: Sight) -> tuple[Array, Array, Array]:
        count, lag = len(sight.candidates), self.lag
        score, error, blurred = 1 + np.arange(count) / count, np.zeros(count), np.zeros(count)
        blocks = (count - self.sinks) // lag
        keys, values = sight.keys[sight.candidates], sight.values[sight.head][sight.candidates]
        for block in range(blocks - 1):
            here = slice(self.sinks + block * lag, self.sinks + (block + 1) * lag)
            after = slice(here.stop, here.stop + lag)
            both = (spread(keys[here], keys[after]) + spread(values[here], values[after])) / 2
            ranks, slack = ranked(both, 4 * sight.rounding * both)
            score[here], error[here], blurred[here] = ranks / lag, slack / lag, slack > 0
        return score, error, blurred


def spread(states: Array, reference: Array) -> Array:
    """Softmax over a block of the deviation over channels, each scaled by the reference's range."""
    low, high = reference.min(0), reference.max(0)
    scaled = (states - low) / (high - low)
    return softmax(scaled.std(-1, ddof=1))


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def ranked(values: Array, error: Array) -> tuple[Array, Array]:
    """(how many are smaller, how far that may be off)."""
    ranks, slack = np.zeros(len(values)), np.zeros(len(values))
    for i in range(len(values)):
        others = np.arange(len(values)) != i
        ranks[i] = (values[others] < values[i]).sum()
        least = (values + error < values[i] - error[i])[others].sum()
        most = (values - error <= values[i] + error[i])[others].sum()
        slack[i] = max(ranks[i] - least, most - ranks[i])
    return ranks, slack


class RKV(Held):
    """Importance for the last 8 queries against redundancy: how alike a key is to later ones."""

    window = 8
    pool = 7
    threshold = 0.5
    balance = 0.1

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return positions >= row.end - self.window

    def measure(self, sight: Sight) -> tuple[Array, Array, Array]:
        c, outside = sight.candidates, sight.outside(self.window)
        logits = sight.logits[:, sight.voters(self.window)][:, :, c[outside]].max(0)  # group's largest
        importance = np.zeros(len(c))
        importance[outside] = softmax(logits).mean(0)
        importance = pooled(importance, outside, "max", self.pool)
        alike, doubt = self.alikeness(directions(sight.keys[c]), sight.rounding)
        redundancy = softmax(alike)
        score = self.balance * importance - (1 - self.balance) * redundancy
        error = 2 * self.balance * importance * sight.rounding
        error += (1 - self.balance) * redundancy * (2 * sight.rounding + doubt)
        return clear(score, error)

    def alikeness(self, unit: Array, rounding: float) -> tuple[Array, Array]:
        """Mean cosine of each key with all others, the latest of those above the threshold left out of each row;
        and what a cosine at the threshold would change."""
        cosines, count = unit @ unit.T, len(unit)
        np.fill_diagonal(cosines, 0)
        doubt = np.zeros(count)
        for row in cosines:
            above = np.flatnonzero(row > self.threshold)
            latest = above[-1] if len(above) else -1
            close = np.flatnonzero(np.abs(row - self.threshold) <= rounding)
            if (close >= latest).any():
                doubt[[*close[close >= latest], *above[-2:]]] += 1 / count
            if latest >= 0:
                row[latest] = 0
        return cosines.mean(0), doubt
