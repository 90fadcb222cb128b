"""A spelling that kvpass does not know, taught from outside (models/own_attention.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvpass.patterns import DEFAULT
from models.attention import KV_HEADS, hidden, layer, past
from models.graphs import capture
from models.own_attention import PATTERNS, MyAttention
from torch import Tensor

import kvpass
from kvpass.pipeline.compose import Backend
from kvpass.sites.scan import scan


def decoder(drop: float = 0.0) -> torch.nn.Module:
    def forward(self: Any, x: Tensor, cache: Any = None) -> Any:
        q, k, v = self.project(x)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        return self.finish(torch.ops.mylib.attend(q, k, v, mask, drop)), (k, v)

    return layer(forward)


def test_it_fires() -> None:
    (site,) = scan(capture(decoder(), hidden(), past()), PATTERNS).sites
    assert (site.core.pattern, site.phase, site.dims["Hkv"]) == ("mylib", "decode", KV_HEADS)
    assert site.core.scale == pytest.approx(8**-0.5)


def test_it_evicts() -> None:
    model = kvpass.compile(decoder(), "streaming_llm", 12, inner="eager", patterns=PATTERNS)
    with torch.no_grad():
        _, cache = model(hidden(40))
        _, cache = model(hidden(), cache)
    assert kvpass.inspect(cache).layers[0].keys.shape[2] == 12


def test_at_full_budget_it_is_the_same() -> None:
    plain, prompt, token = decoder(), hidden(20), hidden()
    model = kvpass.compile(decoder(), "full", inner="eager", patterns=PATTERNS)
    with torch.no_grad():
        want, cache = plain(prompt)
        found, kept = model(prompt)
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(model(token, kept)[0], plain(token, cache)[0])


def test_it_refuses() -> None:
    (found,) = kvpass.explain(decoder(drop=0.1), hidden(), past(), patterns=PATTERNS).tables[0].declined
    assert (found.reason, found.detail, found.pattern) == ("DROPOUT", "drop=0.1", "mylib")
    with pytest.raises(kvpass.KVPassError, match="DROPOUT"), torch.no_grad():
        kvpass.compile(decoder(drop=0.1), "h2o", 8, inner="eager", patterns=PATTERNS)(hidden(), past())


def test_refused_without_a_cache_is_nobodys_business() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return self.finish(torch.ops.mylib.attend(*self.project(x), None, 0.1))

    assert not scan(capture(layer(forward), hidden()), PATTERNS)


def test_without_the_pattern_the_cache_is_declined() -> None:
    (found,) = kvpass.explain(decoder(), hidden(), past()).tables[0].declined
    assert found.reason == "UNSUPPORTED_ATTENTION"
    assert "attend" in found.detail
    assert "sdpa: no call of sdpa reads k_2" in found.near


def test_its_near_misses() -> None:
    def forward(self: Any, x: Tensor, cache: Any) -> Any:
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        wide_k, wide_v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return self.finish(torch.sigmoid(q @ wide_k.mT) @ wide_v), (k, v)

    (found,) = kvpass.explain(layer(forward), hidden(), past(), patterns=PATTERNS).tables[0].declined
    assert found.near[0] == "mylib: no call of attend reads k_2"


def test_theirs_come_first() -> None:
    class Mine:
        name = "mine"

        def match(self, *args: Any) -> Any:
            return None

    mine = Mine()
    made = DEFAULT.extended(cores=[mine], updates=[mine], refused=[mine], expanded=[mine])
    assert made.cores == (mine, *DEFAULT.cores)
    assert made.updates == (mine, *DEFAULT.updates)
    assert made.refused == (mine, *DEFAULT.refused)
    assert made.expanded == (mine, *DEFAULT.expanded)


def test_backends_with_equal_patterns_are_equal() -> None:
    def made(patterns: Any = None) -> Backend:
        return kvpass.backend("h2o", 8, inner="eager", patterns=patterns)

    again = DEFAULT.extended(cores=[MyAttention()])
    assert made(PATTERNS) == made(again)
    assert hash(made(PATTERNS)) == hash(made(again))
    assert made(DEFAULT) == made() == made(DEFAULT.extended())
    assert hash(made(DEFAULT)) == hash(made())
    assert made(PATTERNS) != made()


def test_only_pattern_sets() -> None:
    with pytest.raises(kvpass.KVPassError, match="no pattern set"):
        kvpass.backend("h2o", 8, patterns=[MyAttention()])
