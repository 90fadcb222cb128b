"""Attention that leaves the state alone: what a pad token's query gets. Rare, so plain."""

from __future__ import annotations

import torch
from kvpass.kernels.attention.masks import additive, at_positions, by_kv_head, visible
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.rule import FREE, LIVE
from kvpass.kernels.slots.ragged import is_ragged, padded, padded_rows, used_slots
from torch import Tensor


def look(q: Tensor, mask: Tensor, k: Tensor, v: Tensor, pos: Tensor, cursor: Tensor, softmax: Softmax) -> Tensor:
    """softmax(q k^T scale + mask) v over the used slots; shapes as in decode_attend, the result is [B, Hq, 1, Dv].

    Rows that see nothing get zeros.
    """
    if is_ragged(cursor):
        width = used_slots(cursor)
        k, v, pos = padded_rows(k, cursor, width), padded_rows(v, cursor, width), padded(pos, cursor, width, -1)
    heads, slots = pos.shape[1:]
    slot = torch.arange(slots, device=q.device)
    used = (slot <= cursor[..., LIVE, None]) & (slot != cursor[..., FREE, None])
    here = at_positions(by_kv_head(mask, heads), pos).squeeze(3)
    shown = visible(here) & used.unsqueeze(2)
    keys, values = (x.float().masked_fill(~used[..., None], 0.0) for x in (k, v))
    logits = softmax.capped((q.float() * softmax.factor).reshape(len(q), heads, -1, q.shape[3]) @ keys.mT)
    if mask.dtype != torch.bool:
        logits = logits + additive(here, torch.float32)
    probs = softmax.probabilities(logits.masked_fill(~shown, float("-inf")))
    probs = probs.masked_fill(~shown.any(-1, keepdim=True), 0.0)
    return (probs @ values).to(q.dtype).view(*q.shape[:3], v.shape[3])
