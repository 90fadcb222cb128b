"""join_slots: the keys an extend call sees, past slots in position order, then its own tokens. Pure torch."""

from __future__ import annotations

import torch
from kvpass.kernels.slots.ragged import is_ragged, padded, padded_rows
from torch import Tensor


def join_slots(
    k: Tensor, v: Tensor, pos: Tensor, stats: Tensor, cursor: Tensor, k_new: Tensor, v_new: Tensor, position: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Join the state and the new tokens of an extend call.

    k [B, Hkv, C, D], v [B, Hkv, C, Dv], pos int32 [B, Hkv, C], stats float32 [N, B, Hkv, C], cursor int32
    [B, Hkv, 4]; k_new [B, Hkv, S, D], v_new [B, Hkv, S, Dv] at positions position .. position + S - 1.

    Of a ragged state (`kvpass.kernels.slots.ragged`) a head may hold up to `position` keys: C is `position` then.

    Returns (k [B, Hkv, C+S, D], v, pos, stats): past slots by position, empties first (k, v, stats 0, pos -1), then
    the new tokens with zero statistics. Raises ValueError on shapes that do not fit.
    """
    if k.shape[:3] != pos.shape or k_new.shape[:2] != pos.shape[:2] or k_new.shape[2] != v_new.shape[2]:
        raise ValueError(f"join_slots: k {list(k.shape)}, pos {list(pos.shape)}, k_new {list(k_new.shape)} do not fit")
    if is_ragged(cursor):
        k, v, pos, stats = (
            padded_rows(k, cursor, position),
            padded_rows(v, cursor, position),
            padded(pos, cursor, position, -1),
            padded(stats, cursor, position, 0.0),
        )
    past, order = pos.sort(-1)
    empty = past < 0
    queries = k_new.shape[2]
    new = torch.arange(position, position + queries, dtype=pos.dtype, device=pos.device)
    new = new.expand(*pos.shape[:2], queries)
    zeros = stats.new_zeros(stats.shape[0], *pos.shape[:2], queries)
    index = order.expand(stats.shape[0], *order.shape)
    return (
        torch.cat([_taken(k, order, empty), k_new], 2),
        torch.cat([_taken(v, order, empty), v_new], 2),
        torch.cat([past, new], -1),
        torch.cat([stats.gather(-1, index).masked_fill(empty, 0.0), zeros], -1),
    )


def _taken(x: Tensor, order: Tensor, empty: Tensor) -> Tensor:
    """Rows of x [B, Hkv, C, D] in the given order, with the undefined contents of empties zeroed."""
    return x.gather(2, order[..., None].expand_as(x)).masked_fill_(empty[..., None], 0.0)
