"""Tokens that the caller marks: kept ones stay whatever the policy thinks, spans keep their shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from spelling import with_cache
from transformers import DynamicCache

import kvpass
from kvpass.errors import CacheError

pytestmark = pytest.mark.usefixtures("one_trace")

SLOTS = 48


def conversation(policy: Any, steps: int = 6, **marks: torch.Tensor) -> list[torch.Tensor]:
    """Positions [B, Hkv, C] of both layers after a prompt of two rows and `steps` tokens."""
    model = tiny.one_llama(6, 2)
    compiled = kvpass.compile(model, policy=policy, budget=SLOTS, inner="eager")
    cache, ids = DynamicCache(config=model.config), tiny.tokens(2, 150)
    with torch.no_grad(), kvpass.marked(**marks):
        token = compiled(ids, **with_cache(compiled, cache)).logits[:, -1:].argmax(-1)
        for _ in range(steps):
            token = compiled(token, **with_cache(compiled, cache)).logits[:, -1:].argmax(-1)
    return [layer.positions for layer in kvpass.inspect(cache).layers]


@pytest.mark.parametrize("extends", ["whitelist", "h2o", "knorm", "ada_snapkv"])
def test_marked_tokens_stay(extends: str) -> None:
    keep = torch.zeros(2, 150, dtype=torch.bool)
    keep[0, [7, 60, 61]] = True
    keep[1, 20:30] = True
    policy = {"name": "mine", "extends": extends, "protect": {"tokens": True}}
    for layer in conversation(policy, keep=keep):
        for b in range(2):
            wanted = set(keep[b].nonzero().flatten().tolist())
            for head in layer[b]:
                assert wanted <= set(head.tolist())


def test_spans_keep_their_shares() -> None:
    spans = torch.zeros(2, 150, dtype=torch.long)
    spans[:, 50:90] = 1
    spans[1, 90:100] = 2
    for layer in conversation("fair", steps=0, spans=spans):
        for b in range(2):
            for head in layer[b]:
                free = [p for p in head.tolist() if p < 150 - 32]  # the window stays anyway
                before = spans[b, : 150 - 32]
                for number in before.unique():
                    share = len(free) * int((before == number).sum()) / len(before)
                    assert abs(sum(int(spans[b, p]) == number for p in free) - share) <= 1


def test_what_marks_are_refused() -> None:
    with pytest.raises(CacheError, match="marks of shapes"), kvpass.marked():
        pass
    with pytest.raises(CacheError, match="numbered from 0"), kvpass.marked(spans=torch.tensor([[-1]])):
        pass
    with pytest.raises(CacheError, match="marks for a batch of 3, but the call has 2"):
        conversation("whitelist", steps=0, keep=torch.zeros(3, 150, dtype=torch.bool))
    with pytest.raises(CacheError, match="100 tokens are marked to be kept, but the budget holds 48"):
        conversation("whitelist", steps=0, keep=torch.arange(150).expand(2, 150) < 100)
