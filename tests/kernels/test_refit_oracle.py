"""Attention Matching through the ops, after every call, against `oracle.refit`: which tokens stay, what their biases
and values become, and what attention gives of them. Padded batches, grouped heads, a prompt, steps, two turns more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kvpass.kernels.exits.refit import Refit
from kvpass.kernels.slots.bias import BIAS
from kvpass.kernels.slots.moves import even
from oracle.ops import DIM, Site
from oracle.refit import Head, Token

from kvpass.plan.rule import rule_of
from kvpass.policy.policy import Policy

HEADS, KV = 4, 2
GROUP = HEADS // KV
SINKS, RECENT, WINDOW = 2, 4, 12
TURNS = [([40, 30], "left", 9), ([9, 6], "right", 4), ([2, 12], "left", 6)]
"""Tokens of each row, where padding is not, and steps after them."""

SMALL = {"observe": {"queries": WINDOW}, "protect": {"sinks": SINKS, "recent": RECENT}}


class Talk:
    """One layer of ops under a policy, and what an oracle thinks that it holds."""

    def __init__(self, said: dict[str, Any], budget: int, refit: dict[str, Any]) -> None:
        spec = {"name": "mine", "extends": "am_fast", **SMALL, **said}
        spec["evicted"] = {"refit": {"queries": WINDOW, "ridge": 0.0, **refit}}
        rule = rule_of(Policy.load(spec).with_budget(budget), 0, 1)
        self.ranked = rule[Refit].refit_queries == WINDOW and "score" not in said
        self.site, self.rows = Site(rule, torch.randn(24, HEADS * DIM)), len(TURNS[0][0])
        words = {"values": "fits_values", "iters": "iters", "ridge": "ridge"}
        own = {words[key]: value for key, value in refit.items() if key in words}
        own |= dict(zip(("low", "high"), refit.get("bias", ()), strict=False))
        self.heads = [[Head(DIM**-0.5, **own) for _ in range(KV)] for _ in range(self.rows)]
        self.shown, self.fitted = torch.zeros(self.rows, 0, dtype=torch.bool), 0
        self.generator = torch.Generator().manual_seed(3)

    def converse(self) -> None:
        for lengths, side, steps in TURNS:
            place = torch.arange(max(lengths))
            own = [place >= len(place) - n if side == "left" else place < n for n in lengths]
            self.call(torch.stack(own))
            for _ in range(steps):
                self.call(torch.ones(len(lengths), 1, dtype=torch.bool))

    def call(self, own: torch.Tensor) -> None:
        start, count = self.shown.shape[1], own.shape[1]
        step = count == 1 and start > 0
        self.shown = torch.cat([self.shown, own], 1)
        causal = torch.ones(count, start + count, dtype=torch.bool).tril(start)
        mask = causal & self.shown[:, None, None] & own[:, None, :, None]
        q, k, v = (torch.randn(self.rows, n, count, DIM, generator=self.generator) for n in (HEADS, KV, KV))
        out = (self.site.one if step else self.site.many)(2 * q, k, v, mask, start)
        for b in range(self.rows):
            columns, end = own[b].nonzero().flatten().tolist(), int(self.shown[b].sum())
            numbers = [end - len(columns) + i for i in range(len(columns))]
            for h, head in enumerate(self.heads[b]):
                for n, c in zip(numbers, columns, strict=True):
                    head.tokens[n] = Token(k[b, h, c].double().numpy(), v[b, h, c].double().numpy())
                queries = [
                    (2 * q[b, g, c].double().numpy(), n, out[b, g, c].double().numpy())
                    for g in range(h * GROUP, (h + 1) * GROUP)
                    for n, c in zip(numbers, columns, strict=True)
                ]
                for query, n, got in queries:
                    assert np.allclose(got, head.output(query, n), rtol=1e-4, atol=2e-5)
                watched = [(query, n) for query, n, _ in queries if n >= end - WINDOW]
                self.check(b, h, head, watched, end, step)

    def check(self, b: int, h: int, head: Head, queries: list[Any], end: int, step: bool) -> None:
        state = even(self.site.state)
        number = self.shown[b].cumsum(0) - 1
        held = {int(number[p]): s for s, p in enumerate(state.pos[b, h].tolist()) if p >= 0}
        gone = sorted(set(head.tokens) - set(held))
        protected = {n for n in head.tokens if n < SINKS or n >= end - RECENT}
        assert protected <= set(held)
        span = sorted(set(head.tokens) - protected)
        if not step and gone:
            if self.ranked:
                rank = head.rms(queries)
                worst = min(rank[n] for n in span if n in held)
                assert all(rank[n] <= worst + 1e-6 for n in gone)
            kept = [n for n in span if n in held]
            head.fit(queries, span, kept)
            self.fitted += len(kept)
        for n in gone:
            del head.tokens[n]
        for n, slot in held.items():
            want = head.tokens[n]
            assert abs(float(state[BIAS][b, h, slot]) - want.bias) < 2e-4, (b, h, n)
            assert np.allclose(state.v[b, h, slot].double().numpy(), want.value, rtol=2e-3, atol=2e-3), (b, h, n)


CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "am_fast": ({}, 16, {}),
    "a ridge": ({}, 16, {"ridge": 0.1}),
    "more slots than queries": ({"min_slots": 1}, 36, {}),
    "narrow biases": ({}, 14, {"bias": [-0.2, 0.3], "iters": 5}),
    "biases alone": ({}, 14, {"values": False}),
    "values alone": ({}, 14, {"bias": [0.0, 0.0]}),
    "uneven heads": ({"allocate": {"heads": "flat"}}, 16, {}),
    "on snapkv": ({"score": "mean", "statistic": {"keep": ["sum", "count"], "across_calls": "fresh"}}, 16, {}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_slots_hold_what_the_oracle_says(name: str) -> None:
    talk = Talk(*CASES[name])
    talk.converse()
    assert talk.fitted > 20, "nothing was fitted: the comparison says nothing"


@pytest.mark.parametrize("name", ["am_fast", "biases alone", "values alone"])
def test_the_oracle_sees_a_missing_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(*CASES[name])
    monkeypatch.setattr(Head, "fit", lambda *_: None)
    with pytest.raises(AssertionError):
        talk.converse()
