"""Reference of compact_slots in torch."""

from __future__ import annotations

import torch
from kvpass.kernels.rule import LIVE
from torch import Tensor


def compact_slots_reference(
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    stats: Tensor,
    idx: Tensor,
    cursor_new: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    pos_out: Tensor,
    stats_out: Tensor,
    cursor_out: Tensor,
) -> None:
    """See `kvpass.kernels.compact_slots.compact_slots`."""
    for b, counts in enumerate(cursor_new[..., LIVE].tolist()):
        for h, live in enumerate(counts):
            # One gather per head: ragged counts need no mask, and nothing beyond LIVE is touched.
            rows = idx[b, h, :live]
            torch.index_select(k[b, h], 0, rows, out=k_out[b, h, :live])
            torch.index_select(v[b, h], 0, rows, out=v_out[b, h, :live])
            if stats.shape[0]:
                stats_out[:, b, h, :live] = stats[:, b, h].index_select(-1, rows)
    pos_out.fill_(-1)
    pos_out[..., : idx.shape[-1]] = idx if pos is None else _looked_up(pos, idx)
    cursor_out.copy_(cursor_new)


def _looked_up(pos: Tensor, idx: Tensor) -> Tensor:
    return pos.gather(-1, idx.clamp(min=0).long()).masked_fill_(idx < 0, -1)
