"""Attention in two einsums over [B, T, H, D], True meaning hidden in its mask; a tuple of pairs."""

from __future__ import annotations

from typing import Any

import torch
from models.plain import causal_mask, rotary
from models.styles.style import HEADS, KV_HEADS, Projected, Tupled
from torch import Tensor


class EinsumAttention(Projected):
    tokens_first = True

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        past = 0 if cache is None else cache[0].shape[1]
        q, k, v = self.new(x)
        q, k = (rotary(t.transpose(1, 2), past).transpose(1, 2) for t in (q, k))
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=1), torch.cat([cache[1], v], dim=1)
        y = self.attend(q, k, v, ~causal_mask(x.shape[1], past))
        return self.wo(y.reshape(*x.shape[:2], -1)), (k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        k = k.repeat_interleave(HEADS // KV_HEADS, dim=2)
        v = v.repeat_interleave(HEADS // KV_HEADS, dim=2)
        energy = torch.einsum("bqhd,bkhd->bhqk", [q * self.scale, k])
        energy = energy.masked_fill(extra[None, None], float("-1e20"))
        return torch.einsum("bhqk,bkhd->bqhd", [torch.softmax(energy, dim=3), v])


class GroupedEinsumAttention(EinsumAttention):
    """Query heads of a KV head on an axis of their own."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        q = q.unflatten(2, (KV_HEADS, HEADS // KV_HEADS))
        energy = torch.einsum("bqhgd,bkhd->bhgqk", q, k) * self.scale
        energy.masked_fill_(extra, float("-inf"))
        return torch.einsum("bhgqk,bkhd->bqhgd", energy.softmax(-1), v).flatten(2, 3)


class Einsum(Tupled):
    attention = EinsumAttention


class GroupedEinsum(Tupled):
    attention = GroupedEinsumAttention
