"""Beam search on the unmodified model with masks: each beam sees what a naive cache of its own history kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from oracle.hf import ACTIVE, Oracle
from oracle.simulator import Simulator
from spelling import with_cache
from transformers import DynamicCache


class FollowedCache(DynamicCache):
    """A dense cache of all tokens; where its rows go, what the simulator knows of them goes too."""

    simulator: Simulator

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        reorder(self.simulator, beam_idx.tolist())


def reorder(simulator: Simulator, rows: Sequence[int]) -> None:
    """Row b becomes a copy of row rows[b], with all that its heads hold and remember."""
    for layer in simulator.layers.values():
        for name in ("heads", "valid", "extra"):
            old = getattr(layer, name)
            setattr(layer, name, [copy.deepcopy(old[b]) for b in rows])


def searched(oracle: Oracle, ids: torch.Tensor, mask: torch.Tensor, **asked: Any) -> Any:
    """What `generate` gives with the oracle's model."""
    cache = FollowedCache(config=oracle.model.config)
    cache.simulator = oracle.simulator
    ACTIVE.append(oracle.simulator)
    try:
        return oracle.model.generate(ids, attention_mask=mask, **with_cache(oracle.model, cache), **asked)
    finally:
        ACTIVE.pop()
