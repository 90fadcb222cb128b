"""Which rows a caller asks for, as numbers."""

from __future__ import annotations

from typing import Any

import torch

from kvpass.errors import CacheError


def numbers_of(rows: Any, count: int) -> torch.Tensor:
    """int64 [n]: of `count` rows, those that numbers or flags say.

    Raises:
        CacheError: none, or one that is not there; or no list of rows.
    """
    try:
        asked = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CacheError(f"{rows!r} is no list of rows", hint="give numbers, [0, 2], or a flag for each row") from error
    if asked.dtype is torch.bool and asked.shape == (count,):
        asked = asked.nonzero().flatten()
    if asked.dim() != 1 or asked.dtype is torch.bool or asked.is_floating_point() or asked.is_complex():
        kind = str(asked.dtype).removeprefix("torch.")
        what = f"rows are asked for by {kind} {list(asked.shape)}, but the cache has {count}"
        raise CacheError(what, hint=f"give whole numbers [n], or {count} flags")
    if not len(asked):
        raise CacheError("no row is asked for", hint="a cache without rows is a new one: drop this one instead")
    if not 0 <= int(asked.min()) <= int(asked.max()) < count:
        wrong = next(row for row in asked.tolist() if not 0 <= row < count)
        what = f"row {wrong} is asked for, but the cache has {count}"
        raise CacheError(what, hint=f"give numbers from 0 to {count - 1}")
    return asked.long()
