"""Decoders without transformers: the same rewrite, whatever the layout and the way of carrying the cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import kvpass
import pytest
import torch
from models import plain
from oracle.policies import EVICTING
from oracle.simulator import Simulator

KINDS = [plain.Decoder, plain.GroupedDecoder, plain.AttributeDecoder]
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}
"""Logits of order 1 after two layers of sums of 32 to 64 float32 products, some of them over softmaxes of logits up to 20."""

Step = Callable[[torch.Tensor], torch.Tensor]


class Chat:
    """Calls a decoder turn after turn, wherever it keeps its cache."""

    def __init__(self, model: Any) -> None:
        self.model, self.tuples = model, None

    @property
    def cache(self) -> Any:
        return self.model.cache if isinstance(self.model, plain.AttributeDecoder) else self.tuples

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            if isinstance(self.model, plain.AttributeDecoder):
                return self.model(ids)
            logits, self.tuples = self.model(ids, self.tuples)
            return logits


def naive(model: Any, simulator: Simulator) -> Any:
    """The decoder with its attention computed by the simulator."""
    other = copy.deepcopy(model)
    for block in other.blocks:
        block.core = partial(attend, simulator, block)
    return other


def attend(simulator: Simulator, block: Any, q: Any, k: Any, v: Any) -> Any:
    mask = plain.causal_mask(q.shape[2], k.shape[2] - q.shape[2])
    return simulator.attend(block.index, q, k, v, mask, block.head_dim**-0.5)


def greedy(step: Step, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """All tokens that a decoder chooses after this prompt."""
    chosen = []
    for _ in range(steps):
        ids = step(ids)[:, -1].argmax(-1, keepdim=True)
        chosen.append(ids)
    return torch.cat(chosen, dim=1)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("policy", [("full", None), ("h2o", 1.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_full_budget_is_the_model(kind: Any, policy: tuple[str, float | None], inner: str) -> None:
    name, budget = policy
    model = plain.make(kind)
    expected = Chat(copy.deepcopy(model))
    got = Chat(kvpass.compile(model, policy=name, budget=budget, inner=inner))
    prompt = plain.tokens(2, 30)
    torch.testing.assert_close(got(prompt), expected(prompt), **FLOAT32)
    following = plain.tokens(2, 8, seed=3)
    for t in range(8):
        torch.testing.assert_close(got(following[:, t : t + 1]), expected(following[:, t : t + 1]), **FLOAT32)


@pytest.mark.parametrize("policy", EVICTING)
@pytest.mark.parametrize("kind", KINDS)
def test_eviction_is_the_oracles(kind: Any, policy: str) -> None:
    model = plain.make(kind)
    simulator = Simulator(policy, 48)
    expected, got = Chat(naive(model, simulator)), Chat(kvpass.compile(model, policy=policy, budget=48, inner="eager"))
    ids = plain.tokens(2, 90)
    for _ in range(25):
        ours, theirs = got(ids), expected(ids)
        simulator.follow([layer.positions for layer in kvpass.inspect(got.cache).layers])
        torch.testing.assert_close(ours[:, -1], theirs[:, -1], **FLOAT32)
        ids = ours[:, -1].argmax(-1, keepdim=True)
    assert simulator.near_ties == 0
    assert all(len(held) == 48 for held in simulator.kept(1)[1])


@pytest.mark.parametrize("kind", [plain.Decoder, plain.AttributeDecoder])
def test_extend_is_the_oracles(kind: Any) -> None:
    """Several tokens at once onto a compressed cache. (GroupedDecoder cannot: its is_causal counts from the top left.)"""
    model = plain.make(kind)
    simulator = Simulator("h2o", 48)
    expected, got = Chat(naive(model, simulator)), Chat(kvpass.compile(model, policy="h2o", budget=48, inner="eager"))
    for length in (60, 1, 7, 80, 1):
        ids = plain.tokens(1, length, seed=length)
        torch.testing.assert_close(got(ids)[:, -1], expected(ids)[:, -1], **FLOAT32)
        simulator.follow([layer.positions for layer in kvpass.inspect(got.cache).layers])


def test_backend_string_on_a_plain_decoder() -> None:
    """torch.compile(backend="kvpass") and kvpass.compile choose the same tokens."""
    model = plain.make(plain.Decoder)
    options = {"policy": "tova", "budget": 32}
    by_string = Chat(torch.compile(copy.deepcopy(model), backend="kvpass", options={**options, "inner": "eager"}))
    by_call = Chat(kvpass.compile(model, **options, inner="eager"))
    prompt = plain.tokens(1, 80)
    assert torch.equal(greedy(by_string, prompt, 20), greedy(by_call, prompt, 20))
