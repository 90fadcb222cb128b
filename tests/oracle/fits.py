"""Fits of heads once more, channel by channel in plain Python, each step rounded as float32 rounds it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from oracle import codes
from oracle.codes import f32
from torch import Tensor

Vector = list[float]
QUERIES = 32


@dataclass
class Fit:
    """What becomes of the vectors of one head: entries that are picked, frequencies of the last half of them, less a
    center, over a unit.
    """

    width: int
    picks: list[int] = field(default_factory=list)
    turned: bool = False
    centers: Vector = field(default_factory=list)
    units: Vector = field(default_factory=list)

    def enter(self, x: Vector) -> Vector:
        x = [x[at] for at in self.picks] if self.picks else x
        x = x[: (len(x) + 1) // 2] + frequencies(x[(len(x) + 1) // 2 :]) if self.turned else x
        x = [f32(one - center) for one, center in zip(x, self.centers, strict=True)] if self.centers else x
        return [f32(one / unit) for one, unit in zip(x, self.units, strict=True)] if self.units else x

    def leave(self, y: Vector) -> Vector:
        """Not rounded."""
        y = [one * unit for one, unit in zip(y, self.units, strict=True)] if self.units else y
        y = [one + center for one, center in zip(y, self.centers, strict=True)] if self.centers else y
        y = y[: (len(y) + 1) // 2] + numbers(y[(len(y) + 1) // 2 :]) if self.turned else y
        if not self.picks:
            return y
        out = [0.0] * self.width
        for at, one in zip(self.picks, y, strict=True):
            out[at] = one
        return out


def fit_of(kind: str, queries: list[list[Vector]], vectors: list[Vector], share: float = 1.0) -> Fit:
    """Of the real tokens of one row's first call. queries: those of each query head of the group."""
    width = len(vectors[0])
    if kind == "balance":
        most = [max(abs(x[c]) for x in vectors) for c in range(width)]
        asked = [max(abs(x[c]) for head in queries for x in head) for c in range(width)]
        pairs = zip(most, asked, strict=True)
        return Fit(width, units=[f32(math.sqrt(k / q)) if k > 0 and q > 0 else 1.0 for k, q in pairs])
    if kind == "range":
        return extent(vectors, Fit(width))
    if kind == "channels":
        late = [x for head in queries for x in head[-QUERIES:]]
        importance = [math.fsum(x[c] ** 2 for x in late) * math.fsum(x[c] ** 2 for x in vectors) for c in range(width)]
        best = sorted(range(width), key=lambda c: -importance[c])
        return Fit(width, picks=sorted(best[: math.floor(share * width + 1e-9)]))
    assert kind == "spread"
    best = sorted(range(width), key=lambda c: min(x[c] for x in vectors) - max(x[c] for x in vectors))
    count = (width + 1) // 2
    sorted_ones = Fit(width, sorted(best[:count]) + sorted(best[count:]), turned=True)
    return extent([sorted_ones.enter(x) for x in vectors], sorted_ones)


def extent(vectors: list[Vector], fit: Fit) -> Fit:
    """The fit with centers and units by which the vectors run from -1 to 1; none is below a sixteenth of the mean."""
    ends = [(min(channel), max(channel)) for channel in zip(*vectors, strict=True)]
    fit.centers = [f32(f32(low + high) / 2) for low, high in ends]
    sizes = [f32(f32(high - low) / 2) for low, high in ends]
    least = f32(math.fsum(sizes) / len(sizes) / 16)
    fit.units = [max(size, least) or 1.0 for size in sizes]
    return fit


def frequencies(x: Vector) -> Vector:
    """Cosines of 0, 1, .. turns, then sines of 1, 2, .. turns that are no cosine's: as many as numbers."""
    return [f32(math.fsum(one * w for one, w in zip(x, wave, strict=True))) for wave in waves(len(x))]


def numbers(y: Vector) -> Vector:
    return [math.fsum(one * wave[at] for one, wave in zip(y, waves(len(y)), strict=True)) for at in range(len(y))]


def waves(size: int) -> list[Vector]:
    found = [[math.cos(2 * math.pi * turns * at / size) for at in range(size)] for turns in range(size // 2 + 1)]
    found += [[math.sin(2 * math.pi * turns * at / size) for at in range(size)] for turns in range(1, size // 2 + 1)]
    found = [wave for wave in found if math.fsum(w * w for w in wave) > 1e-9]
    return [[w / math.sqrt(math.fsum(v * v for v in wave)) for w in wave] for wave in found]


def read_back(x: Tensor, name: str, group: int, rotate: bool, fit: Fit) -> Tensor:
    """float64 [n, width]: what vectors of one head are read as once they have been held as codes."""
    entered = torch.tensor([fit.enter(row) for row in x.float().tolist()], dtype=torch.float64)
    back = codes.read_back(entered, name, group, rotate)
    return torch.tensor([fit.leave(row) for row in back.tolist()], dtype=torch.float64).view(x.shape)


def orthonormal(size: int) -> bool:
    """Whether waves are a rotation: what the oracle itself must keep."""
    made = waves(size)
    lengths = all(abs(math.fsum(w * w for w in wave) - 1) < 1e-12 for wave in made)
    apart = all(abs(math.fsum(a * b for a, b in zip(*both, strict=True))) < 1e-12 for both in pairwise(made))
    return lengths and apart and len(made) == size
