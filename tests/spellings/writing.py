"""How new tokens get into the cache. Each function returns the cache with them: the same tensor if it wrote in place.

place: where they begin, an int or a tensor of no axes; or their positions [S]; or a tuple with the positions of all
tokens that may still come, of which each reader takes the first S.
axis: the token axis, counted from the front.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALL = slice(None)


def index_of(place: Any, count: int) -> Tensor:
    """Positions of a call's tokens, [S]."""
    if isinstance(place, tuple):
        return place[0][:count]
    if isinstance(place, Tensor):
        return place if place.dim() else place + torch.arange(count)
    return torch.arange(place, place + count)


def by_cat(cell: Tensor, new: Tensor, place: Any, axis: int) -> Tensor:
    return torch.cat([cell, new], dim=axis)


def by_pad(cell: Tensor, new: Tensor, place: Any, axis: int) -> Tensor:
    """Both padded to the new length, and added."""
    others = (0, 0) * (cell.dim() - 1 - axis)
    return F.pad(cell, (*others, 0, new.shape[axis])) + F.pad(new, (*others, cell.shape[axis], 0))


def by_slice(cell: Tensor, new: Tensor, place: Any, axis: int) -> Tensor:
    cell[(ALL,) * axis + (slice(place, place + new.shape[axis]),)] = new
    return cell


def by_narrow(cell: Tensor, new: Tensor, place: Any, axis: int) -> Tensor:
    cell.narrow(axis, place, new.shape[axis]).copy_(new)
    return cell


def by_index_copy(cell: Tensor, new: Tensor, place: Any, axis: int) -> Tensor:
    return cell.index_copy_(axis, index_of(place, new.shape[axis]), new)


def by_index(cell: Tensor, new: Tensor, place: Any, axis: int) -> Tensor:
    cell[(ALL,) * axis + (index_of(place, new.shape[axis]),)] = new
    return cell


def by_scatter(cell: Tensor, new: Tensor, place: Any, axis: int) -> Tensor:
    index = index_of(place, new.shape[axis])
    index = index.view(-1, *(1,) * (new.dim() - 1 - axis)).expand(new.shape)
    return cell.scatter_(axis, index, new)


def by_index_put(cell: Tensor, new: Tensor, place: Any, axis: int) -> Tensor:
    """Rows of the batch and positions."""
    rows = torch.arange(cell.shape[0])[:, None]
    index = index_of(place, new.shape[axis])[None]
    if axis == 1:
        return cell.index_put_((rows, index), new)
    cell[rows, :, index] = new.transpose(1, 2)
    return cell


def by_rows(cell: Tensor, new: Tensor, place: Any, axis: int) -> Tensor:
    """Token by token."""
    for i in range(new.shape[axis]):
        cell[(ALL,) * axis + (place + i,)] = new.select(axis, i)
    return cell


def by_slice_scatter(cell: Tensor, new: Tensor, place: Any, axis: int) -> Tensor:
    return torch.slice_scatter(cell, new, dim=axis, start=place, end=place + new.shape[axis])


def by_where(cell: Tensor, new: Tensor, place: Any, axis: int) -> Tensor:
    """A prompt at once, then the buffer with one token in its place."""
    index = index_of(place, new.shape[axis])
    if new.shape[axis] > 1:
        return cell.index_copy(axis, index, new)
    return torch.where(one_hot(cell, index, axis), new, cell)


def by_blend(cell: Tensor, new: Tensor, place: Any, axis: int) -> Tensor:
    """The same as a product with the position's one-hot."""
    index = index_of(place, new.shape[axis])
    if new.shape[axis] > 1:
        return cell.index_copy(axis, index, new)
    hit = one_hot(cell, index, axis).to(cell.dtype)
    return cell * (1 - hit) + new * hit


def one_hot(cell: Tensor, index: Tensor, axis: int) -> Tensor:
    return (torch.arange(cell.shape[axis]) == index).view(-1, *(1,) * (cell.dim() - 1 - axis))


WRITES = {
    "cat": by_cat,
    "pad": by_pad,
    "slice": by_slice,
    "narrow": by_narrow,
    "index_copy": by_index_copy,
    "index": by_index,
    "scatter": by_scatter,
    "index_put": by_index_put,
    "rows": by_rows,
    "slice_scatter": by_slice_scatter,
    "where": by_where,
    "blend": by_blend,
}
