"""Decoders without transformers: the same rewrite, whatever the layout and the way of carrying the cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import plain
from oracle.plain import naive
from oracle.policies import EVICTING, RoCo
from oracle.simulator import Simulator

import kvpass

KINDS = [plain.Decoder, plain.GroupedDecoder, plain.AttributeDecoder]
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}
"""Logits of order 1 after two layers of sums of 32 to 64 float32 products, some of them over softmaxes of logits
up to 20."""

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


def greedy(step: Step, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """All tokens that a decoder chooses after this prompt."""
    chosen = []
    for _ in range(steps):
        ids = step(ids)[:, -1].argmax(-1, keepdim=True)
        chosen.append(ids)
    return torch.cat(chosen, dim=1)


FULL = [("full", None), ("h2o", 1.0)]
INDUCTOR = [(kind, FULL[i % 2], "inductor") for i, kind in enumerate(KINDS)]
"""Inductor sees no policy, but the ops that observe or do not: once for each way of carrying the cache."""
MORE = [(kind, FULL[1 - i % 2], "inductor") for i, kind in enumerate(KINDS)]


@pytest.mark.parametrize(
    ("kind", "policy", "inner"),
    [
        *((kind, policy, "eager") for kind in KINDS for policy in FULL),
        *INDUCTOR,
        *(pytest.param(*more, marks=pytest.mark.wide) for more in MORE),
    ],
)
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


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", EVICTING)
@pytest.mark.parametrize("kind", KINDS)
def test_eviction_is_the_oracles(kind: Any, policy: str) -> None:
    model = plain.one(kind)
    simulator = Simulator(policy, 48)
    expected, got = (
        Chat(naive(model, simulator)),
        Chat(kvpass.compile(model, policy=policy, budget=48, inner="eager")),
    )
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
    """Several tokens at once onto a compressed cache. (GroupedDecoder cannot: its is_causal counts from the top
    left.)"""
    model = plain.make(kind)
    simulator = Simulator("h2o", 48)
    expected, got = (
        Chat(naive(model, simulator)),
        Chat(kvpass.compile(model, policy="h2o", budget=48, inner="eager")),
    )
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


def spiky() -> tuple[Any, torch.Tensor]:
    """A model and tokens in which some tokens are looked at hard, once, and otherwise less than all others.

    Token s in 1..6 is ignored by everybody (logit -5) except token 10 + s, which looks at nothing else (logit
    12). All else is
    near uniform. Both kinds of ignored tokens have the lowest means; only those whose caller came vary, and
    RoCo's scope
    saves them. (In random models the least attended token never varies much, so that the scope changes nothing there.)
    """
    logits = torch.randn(32, 32, generator=torch.Generator().manual_seed(3)) * 0.3
    logits[:, 1:7] = -5
    for s in range(1, 7):
        logits[10 + s, s] = 12
    ids = 20 + plain.tokens(1, 150) % 12
    for s in range(1, 7):
        ids[0, 8 + 3 * s] = s
        if s % 2:
            ids[0, 40 + 3 * s] = 10 + s
    return plain.ScriptedDecoder(logits).eval(), ids


@pytest.mark.parametrize("first_call", [64, 110])
def test_roco_scope(first_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scope decides who stays (without it the oracle chooses otherwise), in decode and in prefill, and the
    library agrees."""
    model, ids = spiky()
    calls = [ids[:, :first_call], *ids[:, first_call:].split(1, dim=1)]

    def kept_by_the_oracle() -> list[list[int]]:
        simulator = Simulator("roco", 60)
        chat = Chat(naive(model, simulator))
        return [[chat(part), simulator.kept(0)[0][0].tolist()][1] for part in calls]

    simulator = Simulator("roco", 60)
    expected, got = (
        Chat(naive(model, simulator)),
        Chat(kvpass.compile(model, policy="roco", budget=60, inner="eager")),
    )
    for part in calls:
        torch.testing.assert_close(got(part)[:, -1], expected(part)[:, -1], **FLOAT32)
        simulator.follow([layer.positions for layer in kvpass.inspect(got.cache).layers])
    kept = simulator.kept(0)[0][0].tolist()
    assert all((8 + 3 * s in kept) == bool(s % 2) for s in range(1, 7))
    assert simulator.near_ties == 0
    scoped = kept_by_the_oracle()
    monkeypatch.setattr(RoCo, "untouchable", lambda self, n: 0)
    assert scoped[-1] == kept != kept_by_the_oracle()[-1]
