"""What each policy means, for one KV head of one row, in float64 and plain Python.

Written from shared/policies.md and from the definitions of docs/design/0001, never from kvpass' code. A policy looks
at `rows`: for each query of a call the probabilities over all tokens of the sequence, already averaged over the query
heads that share this KV head, exactly zero where the query may not look or the token was evicted.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from oracle.base import ROUNDING, Budget, Memory, Policy, Row, Sight
from oracle.held import RKV, KeyDiff, Knorm, LagKV, Random
from oracle.needs import CORM, FastGen, SimLayerKV
from oracle.reach import Reach
from oracle.rings import Cascading
from oracle.smooth import pooled
from oracle.weights import Weighted, l1, vo_l1
from oracle.windowed import CAKE, NACL, ChunkKV, DefensiveKV, Finch, Keyformer, LayerDefensiveKV, WindowKV

__all__ = ["EVICTING", "NEW", "POLICIES", "Budget", "Memory", "Policy", "Row"]

Array = np.ndarray


class Full(Policy):
    pass


class StreamingLLM(Policy):
    """The first 4 tokens and as many of the latest as fit."""

    sinks = 4

    def score(self, memory: Memory) -> Array:
        return np.arange(len(memory.sum), dtype=float)

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return positions < row.first + self.sinks


class StreamingLLMReindexed(StreamingLLM):
    reindexed = True


class Streams(StreamingLLM):
    """4 sinks and 16 recent tokens in every head, the latest that fit; a table says who gets the rest (DuoAttention,
    RazorAttention)."""

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return super().protected(positions, row, n) | (positions >= row.end - 16)


class H2O(Policy):
    """Sum of the probabilities from all queries so far; half of the budget goes to the latest tokens."""

    def observe(self, memory: Memory, rows: Array, sees: Array, row: Row, candidates: Array) -> None:
        memory.sum = memory.sum + rows[row.valid].sum(0)

    def score(self, memory: Memory) -> Array:
        return memory.sum

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return positions >= row.end - n // 2


class Tova(Policy):
    """The newest query's probabilities, averaged over all heads of the layer. Nothing is protected."""

    shared = True

    def observe(self, memory: Memory, rows: Array, sees: Array, row: Row, candidates: Array) -> None:
        if row.valid.any():
            memory.sum = rows[np.flatnonzero(row.valid)[-1]].copy()

    def score(self, memory: Memory) -> Array:
        return memory.sum


class SnapKV(Policy):
    """The last 32 queries of a call vote, max-pooled over 7 neighbours; later single tokens add their vote."""

    window = 32
    pool = 7

    def observe(self, memory: Memory, rows: Array, sees: Array, row: Row, candidates: Array) -> None:
        if len(row.valid) == 1:
            if row.valid[0]:
                memory.sum = memory.sum + rows[0]
                memory.count = memory.count + sees[0]
            return
        voters = row.valid & (row.queries >= row.end - self.window)
        memory.sum, memory.count = rows[voters].sum(0), sees[voters].sum(0).astype(float)
        memory.sum[candidates] = self.pooled(memory.sum[candidates], candidates < row.end - self.window)

    def pooled(self, values: Array, outside: Array) -> Array:
        return pooled(values, outside, "max", self.pool)

    def score(self, memory: Memory) -> Array:
        return memory.mean()

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return positions >= row.end - self.window


class RoCo(Policy):
    """Mean of the probabilities; the slots whose probabilities vary most are out of reach."""

    scoped = True
    recent = 10

    def observe(self, memory: Memory, rows: Array, sees: Array, row: Row, candidates: Array) -> None:
        memory.sum = memory.sum + rows[row.valid].sum(0)
        memory.sumsq = memory.sumsq + (rows[row.valid] ** 2).sum(0)
        memory.count = memory.count + sees[row.valid].sum(0)

    def score(self, memory: Memory) -> Array:
        return memory.mean()

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return (positions < row.first + 4) | (positions >= row.end - self.recent)

    def untouchable(self, n: int) -> int:
        return n * 3 // 10 + 1


class Scissorhands(Policy):
    """How often a token got at least an even share, of the queries that saw it; the last 400 of a call vote."""

    window = 400

    def observe(self, memory: Memory, rows: Array, sees: Array, row: Row, candidates: Array) -> None:
        voters = row.valid & (row.queries >= row.end - self.window)
        for share, seen in zip(rows[voters], sees[voters], strict=True):
            even = 1 / max(seen.sum(), 1)
            memory.important = memory.important + (seen & (share >= even))
            memory.count = memory.count + seen
            memory.blurred = memory.blurred + (seen & (np.abs(share - even) <= ROUNDING * even))

    def score(self, memory: Memory) -> Array:
        return memory.important / np.maximum(memory.count, 1)

    def error(self, memory: Memory, rounding: float) -> Array:
        """A verdict on a share that is even but for rounding may be the other one."""
        return memory.blurred / np.maximum(memory.count, 1)

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return (positions < row.first + 4) | (positions >= row.end - 10)


class VATP(Weighted, H2O):
    """H2O's sums times the L1 norm of the value; 20 sinks."""

    def weigh(self, sight: Sight) -> Array:
        return l1(sight)

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return (positions < row.first + 20) | super().protected(positions, row, n)


class CriticalKV(Weighted, SnapKV):
    """Half of the budget by SnapKV's score, the rest by that times what the value gives to the output."""

    scoped = True
    floor = 1e-4

    def weigh(self, sight: Sight) -> Array:
        return vo_l1(sight)

    def untouchable(self, n: int) -> int:
        return n // 2

    def scope_key(self, memory: Memory) -> tuple[Array, Array]:
        plain = SnapKV.score(self, memory)
        return plain, plain / 4


class PyramidKV(SnapKV):
    """SnapKV with budgets that fall from layer to layer in a straight line: policies.md's R6 without its guards, and
    never more than even budgets together."""

    beta = 20

    def budget(self, even: int, seen: int, layer: int, layers: int) -> int:
        base = even - self.window
        if base < (self.beta if self.steady else 1) or layers < 2:
            return even
        low = max(base // self.beta, 1)
        line = Fraction(2 * base - low) + Fraction(layer * 2 * (low - base), layers - 1)
        return math.floor(line) + self.window


class AdaSnapKV(SnapKV):
    safeguard = Fraction(2, 10)


class AdaPyramid(PyramidKV):
    safeguard = Fraction(2, 10)


class CriticalAda(CriticalKV):
    safeguard = Fraction(2, 10)


POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "streaming_llm": StreamingLLM,
    "streaming_llm_reindexed": StreamingLLMReindexed,
    "h2o": H2O,
    "tova": Tova,
    "snapkv": SnapKV,
    "roco": RoCo,
    "vatp": VATP,
    "random": Random,
    "knorm": Knorm,
    "keydiff": KeyDiff,
    "lagkv": LagKV,
    "r_kv": RKV,
    "nacl": NACL,
    "pyramidkv": PyramidKV,
    "ada_snapkv": AdaSnapKV,
    "ada_pyramid": AdaPyramid,
    "criticalkv": CriticalKV,
    "critical_ada": CriticalAda,
    "defensivekv": DefensiveKV,
    "layer_defensivekv": LayerDefensiveKV,
    "chunkkv": ChunkKV,
    "windowkv": WindowKV,
    "finch": Finch,
    "scissorhands": Scissorhands,
    "cake": CAKE,
    "keyformer": Keyformer,
    "cascading": Cascading,
    "corm": CORM,
    "simlayerkv": SimLayerKV,
    "fastgen": FastGen,
    "kvpass": Reach,
}
EVICTING = ["streaming_llm", "h2o", "tova", "snapkv", "roco"]
"""The first five, which look at probabilities and positions alone."""
NEW = [name for name in POLICIES if name not in ("full", *EVICTING)]
