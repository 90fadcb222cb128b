"""Decoders as people write them: matched everywhere, the same at full budget, and evicting as the oracle does."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from models.plain import tokens
from models.styles import (
    alibi,
    from_scratch,
    gpt_fast,
    keyed,
    litgpt,
    llama_reference,
    multihead,
    nanochat,
    nanogpt,
    rebinding,
    sinks,
    stacked,
    torchtune,
)
from models.styles.kinds import BUFFERED, KINDS, TOP_LEFT
from models.styles.oracle import Oracle
from models.styles.style import DIM, LAYERS, greedy, make, one
from torch._subclasses.fake_tensor import FakeTensor

import kvpass
from kvpass.terms import Phase

SOME = [nanogpt.GPT, gpt_fast.Transformer, llama_reference.MovingLlama, rebinding.Rebinding, stacked.Stacked]
"""For each way to keep a cache."""
INDUCTOR = [gpt_fast.Transformer, llama_reference.Llama, alibi.Bloom, sinks.Sinks]
"""Both ways to write into buffers, and the cores with most to them."""


def _wide(kind: Any) -> tuple[Any, ...]:
    """One style through Inductor shows that graphs of styles reach it; the others are in `make wide`."""
    return () if kind is llama_reference.Llama else (pytest.mark.wide,)


KEEPING = [
    gpt_fast.Transformer,
    llama_reference.Llama,
    rebinding.Rebinding,
    stacked.Stacked,
    nanochat.Chat,
    from_scratch.Pointer,
    from_scratch.Listed,
    torchtune.Tuned,
    litgpt.LitToTheEnd,
    keyed.Keyed,
]
"""Those whose cache is no value that the caller passes from call to call."""
BATCH, PROMPT, BUDGET, ROOM = 2, 50, 24, 128
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}
"""Logits of order 1 after two layers of sums of 32 to 64 float32 products."""


def name(kind: Any) -> str:
    return kind.__name__


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("kind", KINDS, ids=name)
@pytest.mark.some(10)
def test_every_attention_is_matched(kind: Any) -> None:
    """In the prefill and in both decode graphs."""
    model = kvpass.compile(one(kind), "full", inner="eager")
    greedy(model, tokens(BATCH, PROMPT), 3)
    graphs = [record.table for record in model.kvpass.graphs]
    assert len(graphs) in (2, 3)
    assert [len(found.sites) for found in graphs] == [LAYERS] * len(graphs)
    assert not any(found.declined for found in graphs)
    assert all(site.phase is Phase.DECODE for found in graphs[1:] for site in found)
    assert all(site.phase is not Phase.DECODE for site in graphs[0])


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("kind", KINDS, ids=name)
@pytest.mark.some(10)
def test_full_budget_is_the_model(kind: Any) -> None:
    same_at_full_budget(one(kind), "eager")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=_wide(kind)) for kind in INDUCTOR], ids=name)
def test_full_budget_is_the_model_in_inductor(kind: Any) -> None:
    same_at_full_budget(make(kind), "inductor")


def same_at_full_budget(model: Any, inner: str) -> None:
    prompt = tokens(BATCH, PROMPT)
    chosen, logits, _ = greedy(copy.deepcopy(model), prompt, 8)
    found, theirs, _ = greedy(kvpass.compile(model, "h2o", 1.0, inner=inner), prompt, 8)
    assert torch.equal(found, chosen)
    torch.testing.assert_close(theirs, logits, **FLOAT32)


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("kind", KINDS, ids=name)
@pytest.mark.some(10)
def test_eviction_is_the_oracles(kind: Any) -> None:
    """Prompt, tokens one by one, several at once, one by one again."""
    original = one(kind)
    compiled = kvpass.compile(original, "h2o", BUDGET, inner="eager")
    oracle, cache, start = Oracle(original, "h2o", BUDGET), compiled.init_cache(BATCH, 128), 0
    calls = [PROMPT, 1, 1, 1, 1, 1, 1 if kind in TOP_LEFT else 9, 1, 1, 1]
    for length in calls:
        ids = tokens(BATCH, length, seed=start)
        with torch.no_grad():
            logits, cache = compiled.step(ids, cache, start)
        start += length
        expected = oracle(ids)
        oracle.simulator.follow([layer.positions for layer in kvpass.inspect(cache).layers])
        torch.testing.assert_close(logits[:, -1], expected, **FLOAT32)
    kv_heads = original.attentions()[0].kv_heads
    assert oracle.simulator.near_ties == 0
    assert oracle.simulator.compared == len(calls) * LAYERS * BATCH * kv_heads
    assert all(len(held) == BUDGET for row in oracle.simulator.kept(LAYERS - 1) for held in row)
    assert kvpass.report(cache).to_dict()["slot_bytes"] == LAYERS * 2 * BATCH * kv_heads * (BUDGET + 1) * DIM * 4


def kv_bytes() -> int:
    """Memory behind all tensors that look like keys and values, dense or compact."""
    gc.collect()
    found = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and not isinstance(t, FakeTensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in found if t.ndim > 3 and t.shape[-1] == DIM}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("kind", [k if k in SOME else pytest.param(k, marks=pytest.mark.wide) for k in KINDS], ids=name)
@pytest.mark.some(2)
def test_dense_keys_and_values_are_gone(kind: Any) -> None:
    """All but the buffers that a style allocates itself, whose bytes the report tells: only it can free them."""
    model = kvpass.compile(make(kind), "h2o", BUDGET, inner="eager")
    before = kv_bytes()
    cache = greedy(model, tokens(BATCH, PROMPT), 2)[2]
    token = LAYERS * 2 * BATCH * model.attentions()[0].kv_heads * DIM * 4
    slots, buffers = (BUDGET + 1) * token, ROOM * token
    data = kvpass.report(cache).to_dict()
    callers = data["caller_bytes"]
    assert callers == (buffers if kind in BUFFERED else 0)
    held = kv_bytes() - before
    assert slots <= held - callers <= 1.03 * slots
    assert data["bytes"] == pytest.approx(held, rel=0.03)


@pytest.mark.parametrize("kind", [kind for kind in KEEPING if kind in KINDS], ids=name)
@pytest.mark.some(3)
def test_a_second_conversation(kind: Any) -> None:
    """The same compiled model on another prompt, from an empty cache."""
    model = make(kind)
    compiled = kvpass.compile(copy.deepcopy(model), "h2o", 1.0, inner="eager")
    for seed, length in ((0, PROMPT), (1, 20)):
        prompt = tokens(BATCH, length, seed)
        expected, _, _ = greedy(copy.deepcopy(model), prompt, 4)
        assert torch.equal(greedy(compiled, prompt, 4)[0], expected)


def test_a_decoder_without_a_cache_is_left_alone() -> None:
    model = make(multihead.Recomputing)
    compiled = kvpass.compile(copy.deepcopy(model), "h2o", BUDGET, inner="eager")
    prompt = tokens(BATCH, PROMPT)
    found, theirs, _ = greedy(compiled, prompt, 3)
    expected, logits, _ = greedy(model, prompt, 3)
    assert torch.equal(found, expected)
    torch.testing.assert_close(theirs, logits, rtol=0, atol=0)
    assert not any(record.table for record in compiled.kvpass.graphs)
