"""Expected Attention against its definition in float64: every rotation is a matrix, every key and position a loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import tiny
from oracle.rope import DIM, hidden_states, projected, turn
from spelling import with_cache
from transformers import DynamicCache

import kvpass

SLOTS, SKIP, FUTURE = 40, 4, 512


def scores(model: Any, layer: int, hidden: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """[Hkv, T] of a row's real tokens."""
    attention, count = model.model.layers[layer].self_attn, len(hidden)
    q, k, v = (
        projected(getattr(attention, f"{x}_proj").weight, hidden, n)
        for x, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    ahead = sum(turn(model, p) for p in range(count, count + FUTURE)) / FUTURE
    out = np.zeros((kv_heads, count))
    for h in range(heads):
        group = h * kv_heads // heads
        mean = q[h, SKIP:].mean(0)
        spread = (q[h, SKIP:] - mean).T @ (q[h, SKIP:] - mean) / (count - SKIP)
        mean, spread = ahead @ mean, ahead @ spread @ ahead.T
        z = np.zeros(count - SKIP)
        for j in range(SKIP, count):
            key = turn(model, j) @ k[group, j]
            z[j - SKIP] = key @ mean / DIM**0.5 + key @ spread @ key / (2 * DIM)
        share = np.exp(z - z.max())
        out[group, SKIP:] += share / share.sum() * kv_heads / heads
    return out * np.linalg.norm(v, axis=-1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4)])
def test_kept_positions(heads: int, kv_heads: int) -> None:
    model = tiny.llama(heads, kv_heads, DIM)
    ids, mask = tiny.left_padded([120, 90])
    with torch.no_grad():
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        with hidden_states(model) as hidden:
            model(ids, attention_mask=mask, position_ids=places)
        compiled = kvpass.compile(model, policy="expected_attention", budget=SLOTS, inner="eager")
        cache = DynamicCache(config=model.config)
        compiled(ids, attention_mask=mask, position_ids=places, **with_cache(compiled, cache))
    for layer, view in enumerate(kvpass.inspect(cache).layers):
        for b, count in enumerate((120, 90)):
            pad = 120 - count
            expected = scores(model, layer, hidden[layer][b, pad:], heads, kv_heads)
            for h in range(kv_heads):
                order = sorted(range(count), key=lambda j, s=expected[h]: (j >= SKIP, -s[j], j))
                assert view.positions[b, h].tolist() == [pad + j for j in sorted(order[:SLOTS])], (layer, b, h)


def test_a_model_without_rotation_is_refused() -> None:
    compiled = kvpass.compile(tiny.gpt2("sdpa"), policy="expected_attention", budget=SLOTS, inner="eager")
    with torch.no_grad(), pytest.raises(kvpass.KVPassError, match="reads queries before their rotation"):
        compiled(tiny.tokens(1, 60))
