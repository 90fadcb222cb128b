"""A conversation compiles two graphs, prefill and decode: shells say that their length changes. Then no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import plain, tiny
from spelling import with_cache
from torch._dynamo.utils import counters
from transformers import DynamicCache

import kvpass

GRAPHS = 2


@pytest.fixture(autouse=True)
def _zero() -> None:
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def breaks() -> dict[str, int]:
    return dict(counters["graph_break"])


RULES = [("h2o", 0.2), ("snapkv", 48), ("full", None)]


@pytest.mark.parametrize(
    ("policy", "budget", "inner"),
    [
        *((*rule, "eager") for rule in RULES),
        (*RULES[0], "inductor"),  # guards are Dynamo's: who compiles the graph behind them adds none
        *(pytest.param(*rule, "inductor", marks=pytest.mark.wide) for rule in RULES[1:]),
    ],
)
def test_decode_never_recompiles(policy: str, budget: Any, inner: str) -> None:
    """Slots grow, positions grow, heads evict: none of it may reach a guard."""
    model = tiny.llama(4, 2)
    compiled = kvpass.compile(model, policy, budget, inner=inner)
    cache, ids = DynamicCache(config=model.config), tiny.tokens(1, 300)
    counts = []
    for _ in range(120):
        with torch.no_grad():
            ids = compiled(ids, **with_cache(compiled, cache), logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        counts.append(graphs())
    assert counts[0] == 1, "the prompt compiled more than one graph"
    assert counts[3] == counts[-1], f"recompiled while decoding: {counts}"
    assert counts[-1] <= GRAPHS
    assert not breaks()


def test_generate_and_other_lengths() -> None:
    """Other prompt lengths cost one dynamic prefill graph, once; decoding after them costs nothing."""
    compiled = kvpass.compile(tiny.llama(4, 2), "h2o", 0.3, inner="eager")
    counts = []
    for length in (100, 140, 90, 333, 57):
        ids = tiny.tokens(1, length)
        compiled.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        counts.append(graphs())
    assert counts[0] <= GRAPHS
    assert counts[1] <= GRAPHS + 1
    assert counts[1] == counts[-1], f"recompiled for known shapes: {counts}"
    assert not breaks()


@pytest.mark.parametrize("kind", [plain.GroupedDecoder, plain.AttributeDecoder])
def test_plain_decoders(kind: Any) -> None:
    """Never more graphs than plain torch.compile needs for the unmodified decoder."""
    model, ids, cache, counts = plain.make(kind), plain.tokens(1, 90), None, []

    def step(module: Any, ids: torch.Tensor, cache: Any) -> Any:
        with torch.no_grad():
            return (module(ids), None) if kind is plain.AttributeDecoder else module(ids, cache)

    reference = torch.compile(plain.make(kind), backend="eager")
    for _ in range(40):
        logits, cache = step(reference, ids, cache)
        ids = logits[:, -1].argmax(-1, keepdim=True)
    needed = graphs()
    torch._dynamo.reset()
    counters.clear()
    compiled, ids, cache = kvpass.compile(model, "h2o", 48, inner="eager"), plain.tokens(1, 90), None
    for _ in range(40):
        logits, cache = step(compiled, ids, cache)
        ids = logits[:, -1].argmax(-1, keepdim=True)
        counts.append(graphs())
    assert counts[-1] <= needed, f"{counts} graphs, unmodified {needed}"
