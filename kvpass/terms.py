"""Shared words as types. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar


class Phase(StrEnum):
    """Prefill: empty past. Extend: past and several queries. Decode: past and one query."""

    PREFILL = "prefill"
    EXTEND = "extend"
    DECODE = "decode"


@dataclass(frozen=True)
class Piece:
    """Where keys, or values, lie in a cached tensor that is not four axes of theirs alone.

    Attributes:
        splits: sizes that each axis of the tensor is split into, its own alone where it is not; 0 for B and T.
        cuts: axis, start and length of what is kept, among the axes after the split.
        order: these axes, as sequences, heads, tokens, entries; and how many of them are heads.
        heads, entries: their numbers.
    """

    splits: tuple[tuple[int, ...], ...]
    cuts: tuple[tuple[int, int, int], ...]
    order: tuple[int, ...]
    head_axes: int
    heads: int
    entries: int


@dataclass(frozen=True)
class Layout:
    """Axis order in which the host caches K and V.

    Attributes:
        axes: of the cached tensor: `B`, `H`, `T`, `D`, or a number for one that holds heads, entries or both halves.
        piece: where K or V is in it; None for the four letters.
    """

    axes: tuple[str | int, ...]
    piece: Piece | None = None

    BHTD: ClassVar[Layout]
    BTHD: ClassVar[Layout]

    @property
    def value(self) -> str:
        """For people: `BHTD`, `BT[64]`."""
        return "".join(f"[{axis}]" if isinstance(axis, int) else axis for axis in self.axes)

    @property
    def token_axis(self) -> int:
        return self.axes.index("T")

    @property
    def batch_axis(self) -> int:
        return self.axes.index("B")

    @property
    def to_heads_first(self) -> tuple[tuple[Any, ...], ...]:
        """Methods of a cached tensor, one after the other, with their arguments, that give [B, H, T, D]."""
        if self.piece is None:
            return () if self.axes == Layout.BHTD.axes else (("transpose", 1, 2),)
        steps: list[tuple[Any, ...]] = []
        splits = tuple(enumerate(self.piece.splits))
        steps += [("unflatten", at, sizes) for at, sizes in reversed(splits) if len(sizes) > 1]
        steps += [("narrow", *cut) for cut in self.piece.cuts]
        if self.piece.order != tuple(range(len(self.piece.order))):
            steps.append(("permute", *self.piece.order))
        heads, entries = self.piece.head_axes, len(self.piece.order) - self.piece.head_axes - 2
        steps += [("unsqueeze", 1)] if not heads else [("flatten", 1, heads)] if heads > 1 else []
        steps += [("unsqueeze", 3)] if not entries else [("flatten", 3, 2 + entries)] if entries > 1 else []
        return tuple(steps)

    def heads(self, sizes: Sequence[Any]) -> Any:
        """KV heads of a cached tensor of these sizes."""
        return self.piece.heads if self.piece is not None else sizes[self.axes.index("H")]

    def entries(self, sizes: Sequence[Any]) -> Any:
        """Entries of a key or value in it."""
        return self.piece.entries if self.piece is not None else sizes[3]


Layout.BHTD, Layout.BTHD = Layout(tuple("BHTD")), Layout(tuple("BTHD"))


class CacheForm(StrEnum):
    """How a cache update is spelled."""

    CONCAT = "cat(past, new)"
    EMPTY = "cat(empty, new)"
    RETURNED = "new returned as the cache"
    BUFFER = "new written into a buffer"


class MaskKind(StrEnum):
    """What a part of a mask does to the logits."""

    ADD = "added"
    KEEP = "True is kept"
    HIDE = "True is hidden"
