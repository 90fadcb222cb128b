"""The oracle: a decoder computed from its definition, in float64, by loops over rows and heads, with no cache but what
the naive simulator of tests/oracle says that a head still holds. Of a spelling it knows only what changes numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from oracle.simulator import Simulator
from spellings.decoder import DIM, HEADS, MEMORIES, WIDTH, Decoder, kv_heads
from torch import Tensor


class Reference:
    """Called with one call's tokens after the other's."""

    def __init__(self, model: Decoder, policy: str, budget: int | float) -> None:
        self.model, self.spelling = model, model.spelling
        self.kv_heads = kv_heads(model.spelling)
        self.simulator, self.start = Simulator(policy, budget), 0
        self.keys: list[Any] = [None for _ in model.layers]
        self.values: list[Any] = [None for _ in model.layers]

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits of the new tokens, [B, S, V]."""
        with torch.no_grad():
            x = self.model.embed.weight.double()[ids]
            if self.spelling.positions == "learned":
                x = x + self.model.learned.weight.double()[self.start : self.start + ids.shape[1]]
            for i, layer in enumerate(self.model.layers):
                x = x + self.layer(i, layer, x)
            self.start += ids.shape[1]
            return x @ self.model.head.weight.double().T

    def layer(self, i: int, layer: Any, x: Tensor) -> Tensor:
        (b, count, _), heads = x.shape, self.kv_heads
        fused = x @ layer.wqkv.weight.double().T
        q = fused[..., :WIDTH].view(b, count, HEADS, DIM).transpose(1, 2)
        k = fused[..., WIDTH : WIDTH + heads * DIM].view(b, count, heads, DIM).transpose(1, 2)
        v = fused[..., WIDTH + heads * DIM :].view(b, count, heads, DIM).transpose(1, 2)
        if self.spelling.positions == "rotary":
            q, k = self.rotated(q), self.rotated(k)
        if self.start:
            k, v = torch.cat([self.keys[i], k], 2), torch.cat([self.values[i], v], 2)
        self.keys[i], self.values[i] = k, v
        y = self.attended(i, layer, q, k, v)
        return y.transpose(1, 2).reshape(b, count, WIDTH) @ layer.wo.weight.double().T

    def rotated(self, x: Tensor) -> Tensor:
        """[B, H, S, D], pair by pair."""
        out, half = torch.empty_like(x), DIM // 2
        for s in range(x.shape[2]):
            for j in range(half):
                angle = (self.start + s) * 100.0 ** (-j / half)
                a, b = x[:, :, s, j], x[:, :, s, half + j]
                out[:, :, s, j] = a * math.cos(angle) - b * math.sin(angle)
                out[:, :, s, half + j] = a * math.sin(angle) + b * math.cos(angle)
        return out

    def attended(self, i: int, layer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (rows, _, count, _), length = q.shape, k.shape[2]
        sees = torch.zeros(count, length, dtype=torch.bool)
        for s in range(count):
            last = self.start + s
            first = max(0, last - 7) if self.spelling.beside == "window" else 0
            sees[s, first : last + 1] = True
        visible = self.simulator.enter(i, sees.expand(rows, HEADS, -1, -1), self.kv_heads)
        y, group = torch.zeros_like(q), HEADS // self.kv_heads
        for b in range(rows):
            weights = []
            for h in range(HEADS):
                logits = self.logits(h, q[b, h], k[b, h // group]).masked_fill(~visible[b, h], -torch.inf)
                extra = self.memory(layer, "memory_k", h // group)
                beside = q[b, h] @ extra.T / math.sqrt(DIM)
                both = torch.cat([beside, logits], 1).softmax(-1)
                values = torch.cat([self.memory(layer, "memory_v", h // group), v[b, h // group]])
                y[b, h] = both @ values
                weights.append(both[:, len(extra) :])
            for h in range(self.kv_heads):
                group_of = slice(h * group, (h + 1) * group)
                self.simulator.observe(i, b, h, torch.stack(weights[group_of]), visible[b, group_of])
        self.simulator.leave(i)
        return y

    def logits(self, head: int, q: Tensor, k: Tensor) -> Tensor:
        logits = q @ k.T / math.sqrt(DIM)
        if self.spelling.beside == "softcap":
            logits = 4.0 * torch.tanh(logits / 4.0)
        if self.spelling.positions == "alibi":
            for s in range(len(q)):
                for t in range(len(k)):
                    logits[s, t] += 2.0 ** (-(head + 1) * 8 / HEADS) * (t - self.start - s)
        return logits

    def memory(self, layer: Any, name: str, head: int) -> Tensor:
        """[M, D] of a KV head, or none."""
        if self.spelling.beside != "memory":
            return torch.zeros(0, DIM, dtype=torch.float64)
        found: Tensor = getattr(layer, name)[head].double()
        assert len(found) == MEMORIES
        return found
