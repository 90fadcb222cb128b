"""Which tokens of its row a call repeats, where the prompt is replayed: an input of the graph."""

from __future__ import annotations

import torch

from kvpass.kernels.rank.replay import Replay
from kvpass.kernels.rule import Rule
from kvpass.runtime.replaying import replaying
from kvpass.runtime.step import CallFacts, SharedInput
from kvpass.terms import CacheForm, Phase


class RepeatedTokens(SharedInput):
    """int32 [B, 2], from which to below which place; equal in calls that repeat nothing."""

    name, axes = "repeated", ("B", "2")

    def applies(self, rule: Rule, phase: Phase, form: CacheForm) -> bool:
        return rule[Replay].replay > 0 and phase is Phase.EXTEND

    def value(self, call: CallFacts) -> torch.Tensor:
        first, block = call.bindings[0], replaying()
        if block is None:
            return torch.zeros(first.sizes["B"](call.args), 2, dtype=torch.int32, device=first.device)
        return block.repeated.to(first.device)


REPEATED = RepeatedTokens()
