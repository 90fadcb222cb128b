"""Which sequences an operation picks out of a shell: the same operation is done to row numbers, which have no data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

COPIES = frozenset({"index_select", "repeat_interleave", "repeat", "tile"})
"""Operations that copy sequences, beside an index in brackets (`__getitem__`)."""


def rows_copied(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], axis: int) -> Any:
    """The rows, int64 [n], that an operation of `COPIES` or an index copies from its first argument, whose sequences
    lie along `axis`; None if it does something else with it.
    """
    shape = args[0].shape
    if func.__name__ == "__getitem__" and not _only(axis, args[1], len(shape)):
        return None
    device = args[0].device
    numbers = _numbers(shape, axis, device)
    try:
        result = func(numbers, *args[1:], **kwargs)
    except (IndexError, RuntimeError, TypeError):  # another axis than that of the rows, or no operation at all
        return None
    return _along(result, axis, len(shape))


def rows_seen(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], axis: int) -> list[Any]:
    """Of each tensor that a view of the first argument gives: the rows that are in it; None where it has other axes.
    Memory is that of the row numbers.
    """
    numbers = _numbers(args[0].shape, axis, torch.device("cpu")).expand(args[0].shape)
    result = func(numbers, *args[1:], **kwargs)
    parts = result if isinstance(result, (list, tuple)) else [result]
    return [_along(part, axis, numbers.dim(), narrow=False) for part in parts]


def _numbers(shape: Sequence[int], axis: int, device: torch.device) -> torch.Tensor:
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    return torch.arange(shape[axis], device=device).view(sizes)


def _along(result: Any, axis: int, dims: int, narrow: bool = True) -> torch.Tensor | None:
    """Row numbers that lie along an axis, and along no other."""
    if not isinstance(result, torch.Tensor) or result.dim() != dims:
        return None
    others = [at for at in range(dims) if at != axis]
    if any(result.shape[at] != 1 if narrow else result.stride(at) != 0 and result.shape[at] > 1 for at in others):
        return None
    rows = result[tuple(slice(None) if at == axis else 0 for at in range(dims))] if result.numel() else None
    return None if rows is None else rows.clone()


def _only(axis: int, index: Any, dims: int) -> bool:
    """Whether an index in brackets touches no axis but one, by a list of rows."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is None for part in parts):
        return False
    dots = [at for at, part in enumerate(parts) if part is Ellipsis]
    if len(dots) > 1:
        return False
    if dots:
        parts[dots[0] : dots[0] + 1] = [slice(None)] * (dims - len(parts) + 1)
    touched = [at for at, part in enumerate(parts) if not (isinstance(part, slice) and part == slice(None))]
    return touched == [axis] and _is_list(parts[axis])


def _is_list(part: Any) -> bool:
    """One number for each row, or a flag."""
    if isinstance(part, torch.Tensor):
        return part.dim() == 1
    if hasattr(part, "__array__"):
        return bool(part.ndim == 1)
    return isinstance(part, (list, range)) and not any(isinstance(one, (list, tuple)) for one in part)
