"""Reference of compact_slots in torch."""

from __future__ import annotations

import torch
from kvpass.kernels.rule import LIVE
from kvpass.kernels.slots.ragged import starts
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
    flat_k, flat_v = k_out.view(-1, k_out.shape[3]), v_out.view(v_out.shape[:3].numel(), v_out.shape[3])
    flat_pos, flat_stats = pos_out.fill_(-1).view(-1), stats_out.view(stats_out.shape[0], pos_out.numel())
    chosen = idx if pos is None else _looked_up(pos, idx)
    first = starts(cursor_new, k_out.shape[2]).tolist()
    for b, counts in enumerate(cursor_new[..., LIVE].tolist()):
        for h, live in enumerate(counts):
            # One gather per head: ragged counts need no mask, and nothing beyond LIVE is touched.
            rows, there = idx[b, h, :live], slice(first[b][h], first[b][h] + live)
            torch.index_select(k[b, h], 0, rows, out=flat_k[there])
            torch.index_select(v[b, h], 0, rows, out=flat_v[there])
            flat_pos[there] = chosen[b, h, :live]
            if stats.shape[0]:
                flat_stats[:, there] = stats[:, b, h].index_select(-1, rows)
    cursor_out.copy_(cursor_new)


def _looked_up(pos: Tensor, idx: Tensor) -> Tensor:
    return pos.gather(-1, idx.clamp(min=0).long()).masked_fill_(idx < 0, -1)
