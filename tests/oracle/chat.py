"""Models whose caches hold codes, in conversation: the same tokens through a compiled model and through its oracle."""

from __future__ import annotations

import functools
from typing import Any

import torch
from models import tiny
from oracle.coded import CodedSimulator
from oracle.drive import kept_positions
from oracle.hf import Oracle
from spelling import with_cache
from torch import Tensor
from transformers import DynamicCache

HEAD_DIM = 16
NEAR_TIES = 0.02
"""Largest share of choices that an oracle in float64 may have made otherwise."""
CLOSE, FLIPPED = 2.0**-12, 2e-2
"""Differences of logits, relative to the largest: what rounding makes of them; and where float32 and float64 see an
entry on two sides of the middle between two codes, so that it is another number by a step of the codec: rare.
"""


@functools.cache
def gentle(head_dim: int = HEAD_DIM, layers: int = 2) -> Any:
    """A tiny model whose attention is not so sharp that the least bit of a code decides."""
    model = tiny.llama(4, 2, head_dim, layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 0.15 if head_dim == HEAD_DIM else 0.03
    return model


class CodedChat:
    """The same tokens through a compiled model and through one whose attention is the simulation.

    Args:
        compiled: of `gentle()`.
        oracle: of the same policy; its simulator's place is taken by `simulator`.
    """

    def __init__(self, compiled: Any, oracle: Oracle, simulator: CodedSimulator) -> None:
        plain = oracle.simulator
        simulator.depth, simulator.outward = plain.depth, plain.outward
        oracle.simulator = simulator
        self.model, self.oracle, self.simulator = compiled, oracle, simulator
        self.cache = DynamicCache(config=compiled.config)
        self.mask: Tensor | None = None
        self.gaps: list[float] = []

    def call(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens behind those so far; the oracle's next ones."""
        new = torch.ones_like(ids) if mask is None else mask
        self.mask = new if self.mask is None else torch.cat([self.mask, new], 1)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        extra = {"attention_mask": self.mask, "position_ids": positions}
        with torch.no_grad():
            out = self.model(ids, **with_cache(self.model, self.cache), use_cache=True, logits_to_keep=1, **extra)
        want = self.oracle(ids, **extra)
        self.follow()
        gap = (out.logits[:, -1] - want).abs().max() / want.abs().max()
        self.gaps.append(float(gap))
        return want.argmax(-1, keepdim=True)

    def follow(self) -> None:
        """The simulation goes on with what the library has chosen, if it might have been its own choice."""
        self.simulator.follow(kept_positions(self.cache))

    def decode(self, token: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            token = self.call(token)
        return token

    def check(self) -> None:
        """No choice of slots is another, and hardly any logit."""
        assert self.simulator.near_ties <= NEAR_TIES * self.simulator.compared
        assert sum(gap > CLOSE for gap in self.gaps) <= 0.1 * len(self.gaps)
        assert max(self.gaps) <= FLIPPED

    def converse(self, steps: tuple[int, int] = (12, 6)) -> None:
        """A padded prompt, tokens, a second turn of unequal rows, tokens."""
        token = self.decode(self.call(*tiny.left_padded([70, 45])), steps[0])
        ids, mask = tiny.left_padded([9, 4], seed=2)
        self.decode(self.call(torch.cat([token, ids], 1), torch.cat([torch.ones_like(token), mask], 1)), steps[1])
