"""Sparse codes: a vector is a few atoms of a dictionary, each times a number. Slow to make: one search of the whole
dictionary for each atom of each vector.

As CSR (arXiv 2412.11741): matching pursuit, float16 numbers, int16 places, 32 bits for each atom. The dictionary is of
the head (`kvpass.kernels.codecs.fitting`) and, behind its atoms, the unit vectors, which nobody holds: outliers are one
atom each, and what has no dictionary is its largest entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from kvpass.kernels.codecs.codec import LARGEST, SCALE, Codec, Part, half
from torch import Tensor


@dataclass(frozen=True)
class Book:
    """A dictionary of heads.

    Attributes:
        atoms: float16 [.., A, K], for vectors [.., n, K].
        picked: atoms int64 [B, Hkv, C] of [B, Hkv, A, K], one for each slot, of the head that it belongs to; None:
            slots belong to the heads where they lie.
    """

    atoms: Tensor
    picked: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def size(self) -> int:
        """Unit vectors included."""
        return self.atoms.shape[-2] + self.atoms.shape[-1]

    def products(self, x: Tensor) -> Tensor:
        """float32 [.., n, size]: vectors [.., n, K] times all atoms."""
        return torch.cat([x @ self.atoms.float().mT, x], -1)

    def rows(self, at: Tensor) -> Tensor:
        """float32 [.., n, K]: the atoms at int64 [.., n]."""
        count, width = self.atoms.shape[-2:]
        place = at.clamp(max=count - 1)
        if self.picked is not None:
            found = self.picked(self.atoms, place)
        else:
            found = self.atoms.gather(-2, place[..., None].expand(*place.shape, width))
        unit = at[..., None] - count == torch.arange(width, device=at.device)
        return torch.where(at[..., None] < count, found.float(), unit.float())

    def sum(self, weights: Tensor) -> Tensor:
        """float32 [.., G, K]: all atoms, mixed by weights [.., G, size]."""
        count = self.atoms.shape[-2]
        return weights[..., :count] @ self.atoms.float() + weights[..., count:]


class Sparse(Codec):
    """`terms` atoms of a vector, by matching pursuit: the atom nearest to what is left, as often as that.

    Args:
        book: the dictionary; None until `reading` gives one.
    """

    def __init__(self, name: str, terms: int, book: Book | None = None) -> None:
        self.name, self.terms, self._book = name, terms, book

    def reading(self, book: Book) -> Codec:
        return Sparse(self.name, self.terms, book)

    @property
    def book(self) -> Book:
        assert self._book is not None, "sparse codes are read with a dictionary"
        return self._book

    def parts(self, width: int, group: int) -> tuple[Part, ...]:
        return Part("codes", self.terms, torch.int16), Part("scale", self.terms, SCALE)

    def encode(self, x: Tensor, group: int) -> tuple[Tensor, ...]:
        rest, codes, scales = x.float().clamp(-LARGEST, LARGEST), [], []
        for _ in range(self.terms):
            near = self.book.products(rest)
            at = near.abs().argmax(-1, keepdim=True)
            scale = half(near.gather(-1, at))
            rest = rest - scale.float() * self.book.rows(at[..., 0])
            codes.append(at.to(torch.int16))
            scales.append(scale)
        return torch.cat(codes, -1), torch.cat(scales, -1)

    def decode(self, parts: Sequence[Tensor], width: int, group: int) -> Tensor:
        places, scales = self._of(parts)
        found = [scales[..., at, None] * self.book.rows(places[..., at]) for at in range(self.terms)]
        whole: Tensor = torch.stack(found).sum(0)
        return whole

    def products(self, queries: Tensor, parts: Sequence[Tensor], group: int) -> Tensor:
        places, scales = self._of(parts)
        near = self.book.products(queries)
        at = places.flatten(-2).unsqueeze(-2).expand(*near.shape[:-1], -1)
        found: Tensor = near.gather(-1, at).unflatten(-1, (-1, self.terms))
        return (found * scales.unsqueeze(-3)).sum(-1)

    def mixed(self, weights: Tensor, parts: Sequence[Tensor], width: int, group: int) -> Tensor:
        places, scales = self._of(parts)
        shares = (weights[..., None] * scales.unsqueeze(-3)).flatten(-2)
        at = places.flatten(-2).unsqueeze(-2).expand(shares.shape)
        return self.book.sum(shares.new_zeros(*shares.shape[:-1], self.book.size).scatter_add_(-1, at, shares))

    def _of(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Places int64 [.., n, terms], of undefined slots any that there is, and numbers, float32."""
        return parts[0].long().clamp(0, self.book.size - 1), parts[1].float()
