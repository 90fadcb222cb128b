"""Policies whose scores come from a weight file, against plain loops in float64. The weights are made here: what is
tested is that the right numbers reach the right slots, in prefill, in a second turn and in decode.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny
from oracle.ops import Layers
from oracle.policies import Streams
from spelling import with_cache
from transformers import DynamicCache

import kvpass
from kvpass.errors import PolicyError

pytestmark = pytest.mark.usefixtures("one_trace")

LAYERS, HEADS, KV_HEADS, DIM = 2, 6, 2, 16
SIZE, WIDE = HEADS * DIM, 12
SLOTS = 40
CALLS = (90, 1, 1, 1, 17, 1, 1, 1, 1)
"""Tokens of each call."""

SHAPES = {
    "q_filters": {"filters": (KV_HEADS, DIM)},
    "kvp": {"w1": (KV_HEADS, WIDE, 2 * DIM + 1), "b1": (KV_HEADS, WIDE), "w2": (KV_HEADS, WIDE), "b2": (KV_HEADS,)},
    "trim_kv": {"w1": (WIDE, SIZE), "b1": (WIDE,), "w2": (KV_HEADS, WIDE), "c": (KV_HEADS,)},
    "kvzap": {"weight": (KV_HEADS, SIZE), "bias": (KV_HEADS,)},
}
PROTECTED = {"q_filters": (0, 0), "kvp": (4, 16), "trim_kv": (0, 0), "kvzap": (0, 32)}  # sinks, recent

Scores = Callable[[dict[str, Any], np.ndarray, np.ndarray, np.ndarray, int, int], float]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def filtered(w: Any, x: Any, k: Any, v: Any, h: int, p: int) -> float:
    return -float(w["filters"][h] @ k)


def ranked(w: Any, x: Any, k: Any, v: Any, h: int, p: int) -> float:
    hidden = np.maximum(w["w1"][h] @ np.concatenate([k, v, [p]]) + w["b1"][h], 0)
    return float(w["w2"][h] @ hidden + w["b2"][h])


def retained(w: Any, x: Any, k: Any, v: Any, h: int, p: int) -> float:
    z = float(w["w2"][h] @ silu(w["w1"] @ x + w["b1"]) + w["c"][h])
    return -math.log1p(math.exp(-z))


def surrogate(w: Any, x: Any, k: Any, v: Any, h: int, p: int) -> float:
    return float(w["weight"][h] @ x + w["bias"][h])


SCORES: dict[str, Scores] = {"q_filters": filtered, "kvp": ranked, "trim_kv": retained, "kvzap": surrogate}


def weights(policy: str, folder: Path) -> tuple[str, dict[str, np.ndarray]]:
    """A file of random weights, and the same in float64."""
    g = torch.Generator().manual_seed(3)
    table = {name: torch.randn(LAYERS, *shape, generator=g) * 0.3 for name, shape in SHAPES[policy].items()}
    path = folder / f"{policy}.pt"
    torch.save(table, path)
    return str(path), {name: value.double().numpy() for name, value in table.items()}


class Recorder:
    """Hidden states, keys and values that reach the cache of the model that is tested: the kept tokens change what
    later layers compute, so that the reference must score those very numbers."""

    def __init__(self, model: Any) -> None:
        self.hidden: list[Any] = [None] * LAYERS
        for at, layer in enumerate(model.model.layers):
            layer.input_layernorm.register_forward_hook(lambda m, a, out, at=at: self.keep(at, out))

    def keep(self, at: int, out: torch.Tensor) -> None:
        self.hidden[at] = out

    def last(self, layer: int) -> np.ndarray:
        """[S, size] of the latest call."""
        found: np.ndarray = self.hidden[layer][0].detach().double().numpy()
        return found


@functools.cache
def recorded() -> tuple[Any, Recorder]:
    """One model for all policies, which share its traces."""
    model = tiny.llama(HEADS, KV_HEADS, DIM, LAYERS)
    return model, Recorder(model)


def keys_and_values(model: Any, layer: int, hidden: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [Hkv, S, D] of hidden states [S, size] at positions from `start` on, float64."""
    attention = model.model.layers[layer].self_attn
    k, v = (
        (hidden @ p.weight.detach().double().numpy().T).reshape(len(hidden), KV_HEADS, DIM).transpose(1, 0, 2)
        for p in (attention.k_proj, attention.v_proj)
    )
    inverse = model.model.rotary_emb.inv_freq.double().numpy()
    angle = np.outer(np.arange(start, start + len(hidden)), inverse)
    cos, sin = (np.concatenate([f(angle)] * 2, -1) for f in (np.cos, np.sin))
    turned = np.concatenate([-k[..., DIM // 2 :], k[..., : DIM // 2]], -1)
    return k * cos + turned * sin, v


@pytest.mark.parametrize("policy", SHAPES)
def test_kept_positions(policy: str, tmp_path: Path) -> None:
    path, table = weights(policy, tmp_path)
    model, recorder = recorded()
    spec = {"name": "mine", "extends": policy, "options": {"file": path}}
    compiled = kvpass.compile(model, policy=spec, budget=SLOTS, inner="eager")
    ids, cache, start = tiny.tokens(1, sum(CALLS)), DynamicCache(config=model.config), 0
    held: list[list[dict[int, float]]] = [[{} for _ in range(KV_HEADS)] for _ in range(LAYERS)]
    sinks, recent = PROTECTED[policy]
    for count in CALLS:
        with torch.no_grad():
            compiled(ids[:, start : start + count], **with_cache(compiled, cache))
        end = start + count
        for layer, view in enumerate(kvpass.inspect(cache).layers):
            hidden = recorder.last(layer)
            k, v = keys_and_values(model, layer, hidden, start)
            w = {name: value[layer] for name, value in table.items()}
            for h in range(KV_HEADS):
                slots = held[layer][h]
                for i in range(count):
                    slots[start + i] = SCORES[policy](w, hidden[i], k[h, i], v[h, i], h, start + i)

                def rank(p: int, slots: dict[int, float] = slots, end: int = end) -> tuple[bool, float, int]:
                    score = slots[p] * (end - 1 - p) if policy == "trim_kv" else slots[p]
                    return p < sinks or p >= end - recent, score, -p

                kept = sorted(sorted(slots, key=rank)[-SLOTS:])
                held[layer][h] = {p: slots[p] for p in kept}
                assert view.positions[0, h].tolist() == kept, f"layer {layer}, head {h}, after {end} tokens"
        start = end


def test_delayed_eviction(tmp_path: Path) -> None:
    """DMS without a budget: a token whose gate says so goes when six newer ones have come, and none before."""
    g = torch.Generator().manual_seed(5)
    table = {"weight": torch.randn(LAYERS, KV_HEADS, SIZE, generator=g), "bias": torch.zeros(LAYERS, KV_HEADS)}
    torch.save(table, tmp_path / "gate.pt")
    model, recorder = recorded()
    spec = {"name": "mine", "extends": "dms", "options": {"file": str(tmp_path / "gate.pt")}, "protect": {"recent": 6}}
    compiled = kvpass.compile(model, policy=spec, inner="eager")
    ids, cache, start = tiny.tokens(1, sum(CALLS)), DynamicCache(config=model.config), 0
    scores: list[list[list[float]]] = [[[] for _ in range(KV_HEADS)] for _ in range(LAYERS)]
    for count in CALLS:
        with torch.no_grad():
            compiled(ids[:, start : start + count], **with_cache(compiled, cache))
        start += count
        for layer, view in enumerate(kvpass.inspect(cache).layers):
            for h, own in enumerate(scores[layer]):
                w = table["weight"][layer, h].double().numpy()
                own += [float(w @ x) for x in recorder.last(layer)]
                kept = [p for p, score in enumerate(own) if score >= 0 or p >= start - 6]
                held = view.positions[0, h]
                assert held[held >= 0].tolist() == kept, f"layer {layer}, head {h}, after {start} tokens"
                assert 6 < len(kept) < 0.8 * start
    report = kvpass.report(cache).to_dict()
    assert report["bytes"] < 0.8 * report["dense_bytes"]


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.pt"
    torch.save({"filters": torch.zeros(1, KV_HEADS, DIM)}, path)
    spec = {"name": "mine", "extends": "q_filters", "options": {"file": str(path)}}
    compiled = kvpass.compile(tiny.one_llama(HEADS, KV_HEADS, DIM, LAYERS), policy=spec, budget=SLOTS, inner="eager")
    with torch.no_grad(), pytest.raises(PolicyError, match=r"'filters' is \[1, 2, 16\], so layers is 1, but 2 in"):
        compiled(tiny.tokens(1, 60))


@pytest.mark.parametrize("policy", ["duo_attention", "razor_attention"])
def test_streaming_heads(policy: str, tmp_path: Path) -> None:
    """The oracle's positions, with shares that do not divide evenly."""
    shares = torch.tensor([[1.0, 0.3, 0.0, 0.7], [0.0, 0.1, 1.0, 0.1]])
    torch.save({"heads": shares}, tmp_path / "heads.pt")
    spec = {"name": "mine", "extends": policy, "allocate": {"heads": "table", "file": str(tmp_path / "heads.pt")}}
    meaning = Streams()
    meaning.sinks += policy == "razor_attention"  # the slot of all that went
    meaning.table = shares.double().numpy()
    layers = Layers(spec, 48, (8, 4), meaning=meaning)
    layers.converse([(150, 40), (60, 3)], [150, 110])
    assert layers.simulator.near_ties == 0
    assert len({len(head.positions) for head in layers.simulator.layers[0].heads[0]}) == 4


def test_heads_by_a_table(tmp_path: Path) -> None:
    """Streaming heads keep sinks and recent tokens, the retrieval head of each layer what the budget leaves."""
    path = tmp_path / "heads.pt"
    torch.save({"heads": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}, path)
    spec = {"name": "mine", "extends": "duo_attention", "allocate": {"file": str(path)}}
    model = tiny.one_llama(HEADS, KV_HEADS, DIM, LAYERS)
    compiled = kvpass.compile(model, policy=spec, budget=SLOTS, inner="eager")
    ids, cache = tiny.tokens(2, 150), DynamicCache(config=model.config)
    with torch.no_grad():
        compiled(ids[:, :120], **with_cache(compiled, cache))
        for at in range(120, 130):
            compiled(ids[:, at : at + 1], **with_cache(compiled, cache))
    few, many = 4 + 16 + 1, 2 * SLOTS - (4 + 16 + 1)
    for layer, view in enumerate(kvpass.inspect(cache).layers):
        for b in range(2):
            for h in range(KV_HEADS):
                kept = many if h == layer else few
                held = [p for p in view.positions[b, h].tolist() if p >= 0]
                assert held == [*range(4), *range(130 - kept + 4, 130)], (layer, b, h)
    dense = 2 * KV_HEADS * 130 * DIM * 4 * 2 * LAYERS
    assert kvpass.report(cache).to_dict()["bytes"] <= dense * (SLOTS + 1) / 130
