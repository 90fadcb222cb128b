"""What a codec is: how a vector of numbers, a token's key or value in one head, is held in few bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCALE = torch.float16
"""Dtype of scales and lowest values: half of them is float32's bytes, and codes are chosen for what it rounds to."""

LARGEST = 65504.0
"""float16's; larger entries are held as this."""


class Part(NamedTuple):
    """One tensor of what a codec makes of vectors."""

    name: str
    size: int
    """Of its last dim."""
    dtype: torch.dtype


class Codec(ABC):
    """Vectors of `width` entries, each token's by itself; `group` neighbouring entries share a scale.

    Attributes:
        name: what a policy file calls it.
    """

    name: str

    @abstractmethod
    def parts(self, width: int, group: int) -> tuple[Part, ...]:
        """The tensors that hold vectors, in order."""

    @abstractmethod
    def encode(self, x: Tensor, group: int) -> tuple[Tensor, ...]:
        """Parts [.., size] of vectors x [.., width], any float dtype."""

    @abstractmethod
    def decode(self, parts: Sequence[Tensor], width: int, group: int) -> Tensor:
        """float32 [.., width] of parts [.., size]."""

    def products(self, queries: Tensor, parts: Sequence[Tensor], group: int) -> Tensor:
        """float32 [.., G, n]: queries float32 [.., G, width] times the vectors of parts [.., n, size]."""
        return queries @ self.decode(parts, queries.shape[-1], group).mT

    def mixed(self, weights: Tensor, parts: Sequence[Tensor], width: int, group: int) -> Tensor:
        """float32 [.., G, width]: the vectors of parts [.., n, size], mixed by weights float32 [.., G, n]."""
        return weights @ self.decode(parts, width, group)

    def reading(self, book: Any) -> Codec:
        """The same with a dictionary (`kvpass.kernels.codecs.sparse.Book`), for those that read one."""
        return self

    def bytes(self, width: int, group: int) -> int:
        """Of one vector, scales included."""
        return sum(part.size * part.dtype.itemsize for part in self.parts(width, group))


def groups_of(width: int, group: int) -> int:
    """How many groups share a vector out: the last one may be shorter."""
    return -(-width // group)


def grouped(x: Tensor, group: int) -> Tensor:
    """float32 [.., width] -> [.., groups, entries of each]: a shorter last group is filled up with its last entry."""
    width = x.shape[-1]
    group = min(group, width)
    missing = -width % group
    if missing:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1)
    parted: Tensor = x.unflatten(-1, (-1, group))
    return parted


def ungrouped(x: Tensor, width: int) -> Tensor:
    """Inverse of `grouped`: [.., groups, entries] -> [.., width]."""
    return x.flatten(-2)[..., :width]


def half(x: Tensor) -> Tensor:
    """As scales are held, at most float16's largest."""
    return x.clamp(-LARGEST, LARGEST).to(SCALE)
