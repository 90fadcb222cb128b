"""The library and the oracle through the same conversation, call by call, compared after each."""

from __future__ import annotations

from typing import Any

import torch
from oracle.base import Policy
from oracle.hf import Oracle
from spelling import with_cache
from transformers import DynamicCache

import kvpass


def kept_positions(cache: Any) -> list[torch.Tensor]:
    """What the library says each layer holds."""
    return [layer.positions for layer in kvpass.inspect(cache).layers]


class Conversation:
    """Feeds the same tokens to a compiled model and to the oracle. Each call checks kept positions and the token
    chosen."""

    def __init__(
        self, model: Any, policy: Any, budget: float | int, meaning: Policy | None = None, **options: Any
    ) -> None:
        """`meaning`: the oracle's policy, where `policy` is not a name that it knows."""
        self.compiled = kvpass.compile(model, policy=policy, budget=budget, **options)
        self.oracle = Oracle(model, policy if meaning is None else meaning, budget)
        self.cache = DynamicCache(config=model.config)
        self.mask: torch.Tensor | None = None

    @property
    def simulator(self) -> Any:
        return self.oracle.simulator

    def call(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """One forward pass of both; `mask` (batch, tokens of this call) marks padding. Returns the library's
        greedy token."""
        extra = self.extra(ids, mask)
        with torch.no_grad():
            out = self.compiled(ids, **with_cache(self.compiled, self.cache), use_cache=True, logits_to_keep=1, **extra)
        expected = self.oracle(ids, **extra)
        self.simulator.follow(kept_positions(self.cache))
        compare_logits(out.logits[:, -1], expected)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def extra(self, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """attention_mask and position_ids as generate() makes them, if anything was padded."""
        if mask is None and self.mask is None:
            return {}
        new = torch.ones_like(ids) if mask is None else mask
        self.mask = new if self.mask is None else torch.cat([self.mask, new], dim=1)
        positions = (self.mask.cumsum(-1) - 1).masked_fill(self.mask == 0, 0)
        return {"attention_mask": self.mask, "position_ids": positions[:, -ids.shape[1] :]}

    def decode(self, token: torch.Tensor, steps: int) -> torch.Tensor:
        """Greedy: feed `token` and what follows, `steps` calls. Returns the next token."""
        for _ in range(steps):
            token = self.call(token)
        return token


LOGITS = 2.0**-12
"""Largest difference of logits, relative to the largest logit. Twice float32's share of a score
(oracle.simulator.ROUNDING, measured), for two float32 computations, and twice again for the last projection."""


def compare_logits(ours: torch.Tensor, expected: torch.Tensor) -> None:
    gap = (ours - expected).abs().max().item()
    allowed = LOGITS * expected.abs().max().item()
    assert gap <= allowed, f"logits differ by {gap:.3g}, float32 explains {allowed:.3g}"
