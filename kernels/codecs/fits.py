"""What the vectors of a head become before they are coded, by numbers that its first call gave: a fit.

x -> some of its entries, those of small range turned to frequencies, minus a center, over a unit. What queries are
asked, and what comes out of mixed values, follows, so that products stay what they were. A fit is of a head, not of its
slots: it is made once (`kvpass.kernels.codecs.fitting`), then frozen, and no slot has a part in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from kvpass.kernels.codecs.codec import Codec
from kvpass.kernels.codecs.fourier import real_fourier
from kvpass.kernels.codecs.sparse import Book
from kvpass.kernels.slots.reductions import Slots
from torch import Tensor

NONE = "none"
PARTS: dict[str, tuple[str, ...]] = {
    NONE: (),
    "balance": ("unit",),
    "range": ("center", "unit"),
    "channels": ("order",),
    "spread": ("order", "center", "unit"),
    "atoms": ("atoms",),
}
"""The tensors of each kind of fit: which entries are picked, in their order; what is taken off; by what is divided; the
dictionary of sparse codes.
"""

START: dict[str, tuple[torch.dtype, Any]] = {
    "order": (torch.int16, "places"),
    "center": (torch.float32, 0.0),
    "unit": (torch.float32, 1.0),
    "atoms": (torch.float16, 0.0),
}
"""Their dtypes, and what they hold in a row that has had no call of several tokens: they change nothing."""


class Held(Protocol):
    """Tensors by the names of a state's fields."""

    def __getitem__(self, name: str, /) -> Tensor: ...


@dataclass(frozen=True)
class Fit:
    """That of a half: tensors [.., 1 or n, K] for vectors [.., n, D], None where the kind has none.

    Attributes:
        width: D, entries of a vector as the model has it.
        turned: whether the second half of the picked entries becomes frequencies.
        book: the dictionary of sparse codes.
    """

    width: int
    turned: bool = False
    order: Tensor | None = None
    center: Tensor | None = None
    unit: Tensor | None = None
    book: Book | None = None

    def codec(self, codec: Codec) -> Codec:
        """The same with the dictionary of this fit, if it reads one."""
        return codec if self.book is None else codec.reading(self.book)

    def entered(self, x: Tensor) -> Tensor:
        """float32 [.., n, K] of vectors [.., n, D]: what is coded."""
        x = self.picked(x)
        x = x if self.center is None else x - self.center
        return x if self.unit is None else x / self.unit

    def asked(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of queries float32 [.., G, D] those of what is coded, [.., G, K], and what is added to the products of each,
        [.., G, 1]. The fit is [.., 1, K].
        """
        q = self.picked(q)
        more = None if self.center is None else (q * self.center).sum(-1, keepdim=True)
        return q if self.unit is None else q * self.unit, more

    def left(self, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """Vectors float32 [.., n, D] of what was coded, [.., n, K]: entries that were not picked are 0. weights: float
        [.., n, slots], by which codes were mixed; None: each stands for itself.
        """
        y = y if self.unit is None else y * self.unit
        if self.center is not None:
            y = y + (self.center if weights is None else self.center * weights.sum(-1, keepdim=True))
        y = _back(y) if self.turned else y
        if self.order is None:
            return y
        return y.new_zeros(*y.shape[:-1], self.width).scatter(-1, _index(self.order, y), y)

    def picked(self, x: Tensor) -> Tensor:
        """float32 [.., n, K] of vectors [.., n, D]: entries in their order, frequencies in the place of the last."""
        x = x.float()
        if self.order is not None:
            x = x.gather(-1, _index(self.order, x))
        return _forth(x) if self.turned else x


def fit_of(held: Held, half: str, kind: str, width: int, own: slice | None = None, slots: Slots | None = None) -> Fit:
    """That of keys (`k`) or values (`v`) of `width` entries, of vectors [B, Hkv, n, width]. own: some heads of the
    flattened [B * Hkv], of vectors [heads, n, width]; slots: of vectors that lie in slots, [B, Hkv, C, width].
    """
    if kind == NONE:
        return _plain(width) if type(width) is int else Fit(width)
    parts = {part: held[f"{half}_{part}"] for part in PARTS[kind]}
    if own is not None:
        parts = {part: x.flatten(0, 1)[own] for part, x in parts.items()}
    book = None
    if "atoms" in parts:
        book = Book(parts.pop("atoms"), slots.picked if slots is not None and slots.ragged else None)
    spread = {part: x.unsqueeze(-2) if slots is None else slots.owned(x) for part, x in parts.items()}
    return Fit(width, kind == "spread", **spread, book=book)


@lru_cache(maxsize=64)
def _plain(width: int) -> Fit:
    """What changes nothing; made once, because steps ask for it."""
    return Fit(width)


def first_part(width: int) -> int:
    """Entries that are not turned, of the `width` of a fit that turns some."""
    return width - width // 2


def _index(order: Tensor, like: Tensor) -> Tensor:
    """int64 [.., n, K]"""
    return order.long().expand(*like.shape[:-1], order.shape[-1])


def _forth(x: Tensor) -> Tensor:
    rest = x.shape[-1] // 2
    first, last = x.split([x.shape[-1] - rest, rest], -1)
    return torch.cat([first, last @ real_fourier(rest, x)], -1)


def _back(x: Tensor) -> Tensor:
    rest = x.shape[-1] // 2
    first, last = x.split([x.shape[-1] - rest, rest], -1)
    return torch.cat([first, last @ real_fourier(rest, x).mT], -1)
