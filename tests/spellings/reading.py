"""What the attention gets of the cache, new tokens included."""

from __future__ import annotations

from typing import Any

from spellings.writing import index_of
from torch import Tensor

ALL = slice(None)


def whole(cell: Tensor, end: Any, axis: int) -> Tensor:
    return cell


def front(cell: Tensor, end: Any, axis: int) -> Tensor:
    """Up to an int, or a tensor of no axes."""
    return cell[(ALL,) * axis + (slice(None, end),)]


def narrowed(cell: Tensor, end: Any, axis: int) -> Tensor:
    return cell.narrow(axis, 0, end)


def covering(cell: Tensor, end: Any, axis: int) -> Tensor:
    """A slice that leaves nothing out."""
    return cell[(ALL,) * axis + (slice(0, None),)]


READS = {
    "all": whole,
    "batch": whole,
    "front": front,
    "front_tensor": front,
    "narrow": narrowed,
    "cover": covering,
}
"""`batch` has taken its slice before the write."""


def end_of(place: Any, count: int) -> Any:
    """Where the new tokens end: an int, or a tensor if the place is one."""
    if isinstance(place, int) or (isinstance(place, Tensor) and not place.dim()):
        return place + count
    return index_of(place, count)[-1] + 1
