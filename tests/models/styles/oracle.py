"""What a style must compute: attention from its definition, over what the naive simulator says that is still held."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from models.plain import causal_mask
from models.styles.style import Attention
from oracle.simulator import Simulator


class Oracle:
    """A style whose attention is computed from its definition, in float64 over full matrices, by the simulator's
    leave.
    """

    def __init__(self, model: Any, policy: str, budget: int | float, batch: int = 2) -> None:
        self.model, self.simulator, self.start = copy.deepcopy(model), Simulator(policy, budget), 0
        for attention in self.model.attentions():
            attention.attend = partial(self.attend, attention)
        self.cache = self.model.init_cache(batch, 128)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits, self.cache = self.model.step(ids, self.cache, self.start)
        self.start += ids.shape[1]
        return logits[:, -1]

    def attend(self, attention: Attention, q: Any, k: Any, v: Any, extra: Any) -> torch.Tensor:
        if attention.tokens_first:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if k.dim() == 3:  # [B, T, D] of one head
            k, v = k.unsqueeze(1), v.unsqueeze(1)
        length = self.start + q.shape[2]
        out = self.weighted(attention, q.double(), k[:, :, :length].double(), v[:, :, :length].double()).to(q.dtype)
        return out.transpose(1, 2) if attention.tokens_first else out

    def weighted(self, attention: Attention, q: Any, k: Any, v: Any) -> torch.Tensor:
        (rows, heads, queries, _), kv_heads = q.shape, k.shape[1]
        sees = causal_mask(queries, self.start).expand(rows, heads, -1, -1)
        visible = self.simulator.enter(attention.index, sees, kv_heads)
        logits = self.logits(attention, q, k.repeat_interleave(heads // kv_heads, 1))
        weights = normalised(logits.masked_fill(~visible, -torch.inf), attention.sink_logits())
        for b in range(rows):
            for h in range(kv_heads):
                group = slice(h * heads // kv_heads, (h + 1) * heads // kv_heads)
                self.simulator.observe(attention.index, b, h, weights[b, group], visible[b, group])
        self.simulator.leave(attention.index)
        return weights @ v.repeat_interleave(heads // kv_heads, 1)

    def logits(self, attention: Attention, q: Any, k: Any) -> torch.Tensor:
        logits = q @ k.transpose(-1, -2) * attention.scale
        if attention.softcap:
            logits = attention.softcap * torch.tanh(logits / attention.softcap)
        bias = attention.bias(torch.arange(self.start, k.shape[2]), torch.arange(k.shape[2]))
        return logits if bias is None else logits + bias.double()


def normalised(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the keys, and over a sink of each head that keeps its share."""
    if sinks is None:
        return logits.softmax(-1)
    column = sinks.double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1]
