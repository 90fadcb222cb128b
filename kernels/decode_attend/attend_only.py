"""Attention that leaves the state alone: what a pad token's query gets. Rare, so plain."""

from __future__ import annotations

import torch
from kvpass.kernels.attention.masks import additive, at_positions, by_kv_head, visible
from kvpass.kernels.codecs.entries import entries_of
from kvpass.kernels.decode_attend.call import Call
from kvpass.kernels.slots.bias import BIAS, biased
from kvpass.kernels.slots.moves import even
from kvpass.kernels.slots.state import State
from torch import Tensor


def attend_only(q: Tensor, state: State, call: Call) -> Tensor:
    """softmax(q k^T scale + mask) v over the used slots; shapes as in decode_attend, the result is [B, Hq, 1, Dv].

    Rows that see nothing get zeros, or all of the memory.
    """
    state, softmax = even(state), call.softmax
    heads = state.pos.shape[1]
    used, keys = state.used(), entries_of(state, "k", call.rule)
    shown, added = seen_slots(call, torch.where(used, state.pos, -1))
    keys, values = (x.float().masked_fill(~used[..., None], 0.0) for x in (keys, call.values(state)))
    logits = softmax.capped((q.float() * softmax.factor).reshape(len(q), heads, -1, q.shape[3]) @ keys.mT)
    logits = logits if added is None else logits + added
    logits = logits + state[BIAS][:, :, None] if biased(call.rule) else logits
    probs = softmax.probabilities(logits.masked_fill(~shown, float("-inf")))
    probs = probs.masked_fill(~shown.any(-1, keepdim=True), 0.0)
    out = probs @ values
    out = out if softmax.beside is None else softmax.beside.added(out, probs.sum(-1, keepdim=True))
    return out.to(q.dtype).view(*q.shape[:3], values.shape[3])


def seen_slots(call: Call, pos: Tensor) -> tuple[Tensor, Tensor | None]:
    """Which slots at positions pos, int32 [B, Hkv, n], -1 = empty, the query sees, bool [B, Hkv, 1 or G, n]; and what
    is added to their logits, float32, or None.
    """
    shown = (pos >= 0).unsqueeze(2)
    if call.mask is not None:
        here = at_positions(by_kv_head(call.mask, pos.shape[1]), pos).squeeze(3)
        added = None if call.mask.dtype == torch.bool else additive(here, torch.float32)
        return shown & visible(here), added
    if call.low > 0:
        shown = shown & (pos >= call.low).unsqueeze(2)
    if call.tokens is not None:
        tokens = call.tokens[:, None].expand(len(pos), pos.shape[1], -1)
        shown = shown & tokens.gather(2, pos.clamp(min=0).long()).unsqueeze(2)
    return shown, None
