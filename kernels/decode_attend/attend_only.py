"""Attention that leaves the state alone: what a pad token's query gets. Rare, so plain."""

from __future__ import annotations

import torch
from kvpass.kernels.attention.masks import additive, at_positions, by_kv_head, visible
from kvpass.kernels.decode_attend.call import Call
from kvpass.kernels.slots.moves import even
from kvpass.kernels.slots.state import State
from torch import Tensor


def attend_only(q: Tensor, state: State, call: Call) -> Tensor:
    """softmax(q k^T scale + mask) v over the used slots; shapes as in decode_attend, the result is [B, Hq, 1, Dv].

    Rows that see nothing get zeros.
    """
    state, mask, softmax = even(state), call.mask, call.softmax
    assert mask is not None
    heads = state.pos.shape[1]
    used = state.used()
    here = at_positions(by_kv_head(mask, heads), state.pos).squeeze(3)
    shown = visible(here) & used.unsqueeze(2)
    keys, values = (x.float().masked_fill(~used[..., None], 0.0) for x in (state.k, call.values(state)))
    logits = softmax.capped((q.float() * softmax.factor).reshape(len(q), heads, -1, q.shape[3]) @ keys.mT)
    if mask.dtype != torch.bool:
        logits = logits + additive(here, torch.float32)
    probs = softmax.probabilities(logits.masked_fill(~shown, float("-inf")))
    probs = probs.masked_fill(~shown.any(-1, keepdim=True), 0.0)
    return (probs @ values).to(q.dtype).view(*q.shape[:3], values.shape[3])
