"""Learned keys and values in front of the cache: attended to by every query, in the denominator of every score, never
evicted, never counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle.simulator import Simulator
from torch import Tensor, nn

import kvpass
from kvpass.errors import DeclinedError
from kvpass.lowering.pure import decompositions

HEADS, KV_HEADS, DIM, MEMORIES, WIDTH, ROOM, BUDGET = 4, 2, 8, 3, 32, 40, 9
CALLS = (16, 1, 1, 4, 1)
Pair = tuple[Tensor, Tensor]


class Attends(nn.Module):
    """One layer; `hide` makes its mask of the tokens' mask."""

    def __init__(self, hide: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.hide = hide
        self.emb, self.out = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50)
        self.q, self.kv = nn.Linear(WIDTH, HEADS * DIM), nn.Linear(WIDTH, 2 * KV_HEADS * DIM)
        nn.init.normal_(self.q.weight, std=0.4)
        nn.init.normal_(self.kv.weight, std=0.4)
        self.memory = nn.Parameter(torch.randn(2, KV_HEADS, MEMORIES, DIM))

    def projected(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (b, t), x = ids.shape, self.emb(ids)
        k, v = self.kv(x).view(b, t, 2, KV_HEADS, DIM).permute(2, 0, 3, 1, 4)
        return self.q(x).view(b, t, HEADS, DIM).transpose(1, 2), k, v

    def attended(self, q: Tensor, k: Tensor, v: Tensor, shown: Tensor) -> Tensor:
        k, v = (torch.cat([m.expand(len(x), -1, -1, -1), x], 2) for m, x in zip(self.memory, (k, v), strict=True))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.hide(shown), enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Grows(Attends):
    def forward(self, ids: Tensor, past: Pair | None = None) -> tuple[Tensor, Pair]:
        q, k, v = self.projected(ids)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        count, length = q.shape[2], k.shape[2]
        return self.attended(q, k, v, torch.ones(count, length, dtype=torch.bool).tril(length - count)), (k, v)

    def step(self, ids: Tensor, start: int, cache: Pair | None) -> tuple[Tensor, Pair]:
        logits, cache = self(ids, cache)
        return logits, cache


class Writes(Attends):
    """Into a buffer of the host's, all of which it reads."""

    def forward(self, ids: Tensor, at: Tensor, buffers: Pair) -> Tensor:
        q, k, v = self.projected(ids)
        for buffer, new in zip(buffers, (k, v), strict=True):
            buffer[:, :, at] = new
        return self.attended(q, *buffers, torch.arange(ROOM) <= at[:, None])

    def step(self, ids: Tensor, start: int, cache: Pair | None) -> tuple[Tensor, Pair]:
        shape = len(ids), KV_HEADS, ROOM, DIM
        cache = (torch.zeros(shape), torch.zeros(shape)) if cache is None else cache
        return self(ids, torch.arange(start, start + ids.shape[1]), cache), cache


def padded(shown: Tensor) -> Tensor:
    return F.pad(shown, (MEMORIES, 0), value=True)


def behind_ones(shown: Tensor) -> Tensor:
    return torch.cat([shown.new_ones(len(shown), MEMORIES), shown], 1)


def numbers(shown: Tensor) -> Tensor:
    return F.pad(torch.zeros(shown.shape).masked_fill(~shown, float("-inf")), (MEMORIES, 0))


def hiding(shown: Tensor) -> Tensor:
    return F.pad(shown, (MEMORIES, 0), value=False)


def hiding_one(shown: Tensor) -> Tensor:
    return padded(shown) & (torch.arange(MEMORIES + shown.shape[1]) != 1)


def adding(shown: Tensor) -> Tensor:
    return numbers(shown) + F.pad(torch.zeros(shown.shape), (MEMORIES, 0), value=0.5)


def tokens(length: int, seed: int) -> Tensor:
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(seed))


class Reference:
    """The same layer as one matrix over all tokens so far and the memory, with what the simulator still holds."""

    def __init__(self, model: Attends, policy: str, budget: int | float) -> None:
        self.model, self.simulator = model, Simulator(policy, budget)
        self.k, self.v = (torch.zeros(2, KV_HEADS, 0, DIM) for _ in range(2))

    def __call__(self, ids: Tensor, start: int) -> Tensor:
        q, k, v = self.model.projected(ids)
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        count, group = ids.shape[1], HEADS // KV_HEADS
        sees = torch.ones(count, start + count, dtype=torch.bool).tril(start)
        visible = self.simulator.enter(0, sees.expand(2, HEADS, -1, -1), KV_HEADS)
        y = torch.zeros_like(q)
        for b in range(2):
            for h in range(KV_HEADS):
                mine = slice(h * group, (h + 1) * group)
                logits = (q[b, mine] @ self.k[b, h].T).masked_fill(~visible[b, mine], float("-inf"))
                beside = q[b, mine] @ self.model.memory[0, h].T
                weights = (torch.cat([beside, logits], -1) / DIM**0.5).softmax(-1)
                y[b, mine] = weights @ torch.cat([self.model.memory[1, h], self.v[b, h]])
                self.simulator.observe(0, b, h, weights[..., MEMORIES:].double(), visible[b, mine])
        self.simulator.leave(0)
        return self.model.out(y.transpose(1, 2).flatten(2))


def talk(make: type[Attends], hide: Any, policy: str, budget: int | float, **options: Any) -> tuple[Any, Any]:
    """The compiled model and its cache after a conversation in which each call is as the reference has it."""
    model = make(hide).eval()
    compiled = kvpass.compile(model, policy, budget, inner="eager", **options)
    cache, start = None, 0
    with torch.no_grad():
        reference = Reference(model, policy, budget)
        for seed, length in enumerate(CALLS):
            ids = tokens(length, seed)
            logits, cache = compiled.step(ids, start, cache)
            torch.testing.assert_close(logits, reference(ids, start), rtol=1e-4, atol=1e-4)
            reference.simulator.follow([layer.positions for layer in kvpass.inspect(cache).layers])
            start += length
    return compiled, cache


@pytest.mark.parametrize("hide", [padded, behind_ones, numbers])
@pytest.mark.parametrize("make", [Grows, Writes])
def test_full_budget_is_the_model(make: type[Attends], hide: Any) -> None:
    compiled, _ = talk(make, hide, "full", 1.0, verify=True)
    assert len(compiled.kvpass.graphs) <= 4


@pytest.mark.parametrize(("policy", "hide"), [("h2o", behind_ones), ("streaming_llm", padded), ("h2o", numbers)])
@pytest.mark.parametrize("make", [Grows, Writes])
def test_the_cache_is_evicted_and_the_memory_is_not(make: type[Attends], policy: str, hide: Any) -> None:
    compiled, cache = talk(make, hide, policy, BUDGET)
    assert len(compiled.kvpass.graphs) <= 4
    said = kvpass.report(cache).to_dict()
    assert said["slot_bytes"] == (BUDGET + 1) * 2 * 2 * KV_HEADS * DIM * 4  # the memory is no part of the cache
    for graph in compiled.kvpass.graphs:
        assert all(not site.seen.read for site in graph.table.sites), "its mask is proved, behind the memory"


@pytest.mark.parametrize("hide", [hiding, hiding_one, adding])
def test_a_mask_that_hides_the_memory_is_declined(hide: Any) -> None:
    compiled = kvpass.compile(Grows(hide).eval(), "h2o", BUDGET, inner="eager")
    with torch.no_grad(), pytest.raises(DeclinedError, match=f"a mask hides some of the {MEMORIES} memory keys"):
        compiled.step(tokens(16, 0), 0, None)


def test_a_causal_mask_from_the_first_memory_key_is_declined() -> None:
    class Causal(Grows):
        def attended(self, q: Tensor, k: Tensor, v: Tensor, shown: Tensor) -> Tensor:
            k, v = (torch.cat([m.expand(len(x), -1, -1, -1), x], 2) for m, x in zip(self.memory, (k, v), strict=True))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.out(y.transpose(1, 2).flatten(2))

    compiled = kvpass.compile(Causal(padded).eval(), "h2o", BUDGET, inner="eager")
    with torch.no_grad(), pytest.raises(DeclinedError, match="is_causal=True counts from the first"):
        compiled.step(tokens(16, 0), 0, None)


def tiled(x: Tensor) -> Tensor:
    return x.repeat(1, HEADS // KV_HEADS, 1, 1)


def interleaved(x: Tensor) -> Tensor:
    return x.repeat_interleave(HEADS // KV_HEADS, 1)


class Joins(Grows):
    """Memory for each KV head in front of the repeat, or for each query head behind it."""

    def __init__(self, repeat: Any, of_queries: bool) -> None:
        super().__init__(padded)
        self.repeat, self.of_queries = repeat, of_queries
        if of_queries:
            self.memory = nn.Parameter(torch.randn(2, HEADS, MEMORIES, DIM))

    def attended(self, q: Tensor, k: Tensor, v: Tensor, shown: Tensor) -> Tensor:
        if self.of_queries:
            k, v = self.repeat(k), self.repeat(v)
        k, v = (torch.cat([m.expand(len(x), -1, -1, -1), x], 2) for m, x in zip(self.memory, (k, v), strict=True))
        if not self.of_queries:
            k, v = self.repeat(k), self.repeat(v)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=padded(shown)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("of_queries", [False, True])
@pytest.mark.parametrize("repeat", [tiled, interleaved])
def test_the_heads_of_a_memory(repeat: Any, of_queries: bool) -> None:
    """`verify` compares heads in the order of the ops with the model's own."""
    model = Joins(repeat, of_queries).eval()
    compiled = kvpass.compile(model, "full", 1.0, inner="eager", verify=True)
    start, got, want = 0, None, None
    with torch.no_grad():
        for seed, length in enumerate(CALLS):
            ids = tokens(length, seed)
            (ours, got), (theirs, want) = compiled.step(ids, start, got), model.step(ids, start, want)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            start += length


def test_an_exported_step() -> None:
    class Step(Attends):
        def forward(self, ids: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, ...]:
            q, k, v = self.projected(ids)
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
            return self.attended(q, k, v, ids), k, v

    model, past = Step(lambda shown: None).eval(), torch.randn(2, KV_HEADS, 5, DIM)  # one query sees all
    shapes = (None, {2: torch.export.Dim.DYNAMIC}, {2: torch.export.Dim.DYNAMIC})
    with torch.no_grad():
        program = torch.export.export(model, (tokens(1, 0), past, past.clone()), dynamic_shapes=shapes)
        rewritten = kvpass.rewrite(program, "full", 1.0)
        for step in (rewritten.graph_module, rewritten.program.run_decompositions(decompositions()).module()):
            state, k, v = rewritten.empty_state(8), past[:, :, :0], past[:, :, :0]
            for t in range(6):
                logits, *state = step(tokens(1, t), t, *state)
                expected, k, v = model(tokens(1, t), k, v)
                torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
