"""Compactor against its definition in float64: leverage by an inverse, attention key by key."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kvpass.kernels.rank.scorers.chance import gaussian
from models import tiny
from oracle.rope import DIM, hidden_states, projected, turn
from spelling import with_cache
from transformers import DynamicCache

import kvpass

SLOTS, SKETCH, CHUNK, BLEND = 40, 10, 32, 0.35
SPEC = {"name": "mine", "extends": "compactor", "options": {"sketch": SKETCH, "chunk": CHUNK}}


class Numbers:
    """What `gaussian` asks of a `Seen`."""

    def __init__(self, layer: int, kv_heads: int) -> None:
        self.layer, self.heads_before, self.seed, self.pos = layer, 0, 0, torch.zeros(1, kv_heads, 1)


def standard(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / x.std(ddof=1)


def scores(model: Any, layer: int, hidden: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """[Hkv, T] of a row's tokens, all but the first 8 and the last 4."""
    attention = model.model.layers[layer].self_attn
    q, k, v = (
        projected(getattr(attention, f"{x}_proj").weight, hidden, n)
        for x, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    body = range(8, len(hidden) - 4)
    random = gaussian(Numbers(layer, kv_heads), DIM, SKETCH).double().numpy() / SKETCH**0.5
    apart, heard = np.zeros((kv_heads, len(body))), np.zeros((kv_heads, len(body)))
    for h in range(kv_heads):
        x = (k[h, body] - k[h, body].mean(0)) @ random[h]
        inverse = np.linalg.inv(x.T @ x + 1e-2 * np.eye(SKETCH))
        apart[h] = [row @ inverse @ row for row in x]
        for i in body:
            near = [j for j in body if (j - 8) // CHUNK == (i - 8) // CHUNK]
            for g in range(h * heads // kv_heads, (h + 1) * heads // kv_heads):
                z = np.array([(turn(model, i) @ q[g, i]) @ (turn(model, j) @ k[h, j]) for j in near])
                z = np.exp(z - z.max())
                heard[h, np.array(near) - 8] += z / z.sum() * kv_heads / heads
        heard[h] *= np.linalg.norm(v[h, body], axis=-1)
        padded = np.concatenate([[0], heard[h], [0]])
        heard[h] = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    return BLEND * standard(apart) + standard(heard)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4)])
def test_kept_positions(heads: int, kv_heads: int) -> None:
    model = tiny.llama(heads, kv_heads, DIM)
    lengths = (120, 90)
    ids, mask = tiny.left_padded(list(lengths))
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    compiled = kvpass.compile(model, policy=SPEC, budget=SLOTS, inner="eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        with hidden_states(model) as hidden:
            model(ids, attention_mask=mask, position_ids=places)
        compiled(ids, attention_mask=mask, position_ids=places, **with_cache(compiled, cache))
    before = [view.positions.clone() for view in kvpass.inspect(cache).layers]
    for layer, positions in enumerate(before):
        for b, count in enumerate(lengths):
            expected = scores(model, layer, hidden[layer][b, 120 - count :], heads, kv_heads)
            for h in range(kv_heads):
                best = sorted(range(8, count - 4), key=lambda j, s=expected[h]: (-s[j - 8], j))[: SLOTS - 12]
                kept = sorted([*range(8), *best, *range(count - 4, count)])
                assert positions[b, h].tolist() == [120 - count + j for j in kept], (layer, b, h)


def test_later_calls_are_scored_among_themselves() -> None:
    """A second call of several tokens: the older slots keep their scores, so what it evicts of them was low before."""
    model = tiny.llama(6, 2, DIM)
    compiled = kvpass.compile(model, policy=SPEC, budget=SLOTS, inner="eager")
    ids, cache = tiny.tokens(1, 150), DynamicCache(config=model.config)
    with torch.no_grad():
        compiled(ids[:, :100], **with_cache(compiled, cache))
        first = [[set(p) for p in view.positions[0].tolist()] for view in kvpass.inspect(cache).layers]
        compiled(ids[:, 100:], **with_cache(compiled, cache))
    for view, old in zip(kvpass.inspect(cache).layers, first, strict=True):
        for h, kept in enumerate(view.positions[0].tolist()):
            assert len(kept) == SLOTS
            assert {p for p in kept if p < 100} <= old[h]
            assert set(range(8)) | set(range(146, 150)) <= set(kept)
