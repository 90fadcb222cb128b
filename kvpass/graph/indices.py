"""The index of a `getitem` or a `setitem`, one item for each axis."""

from __future__ import annotations

from typing import Any

from torch import fx

ALL = slice(None)
END = (1 << 63) - 1
"""The end of an aten slice that has none."""


def index_of(node: fx.Node) -> tuple[Any, ...]:
    """Items of `x[..]` as they are written."""
    index = node.args[1]
    return tuple(index) if isinstance(index, (tuple, list)) else (index,)


def by_axis(index: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    """Items without an ellipsis, and one for each of `rank` axes; for an index that adds none."""
    if any(item is Ellipsis for item in index):
        at = next(at for at, item in enumerate(index) if item is Ellipsis)
        index = (*index[:at], *(ALL,) * (rank - len(index) + 1), *index[at + 1 :])
    return (*index, *(ALL,) * (rank - len(index)))


def is_all(item: Any) -> bool:
    """`:`"""
    return isinstance(item, slice) and item == ALL
