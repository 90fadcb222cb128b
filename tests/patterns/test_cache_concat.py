"""Caches grown by torch.cat: fires, refuses, reports why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvpass.patterns.cache_concat import ConcatUpdate
from models.attention import KV_HEADS, attend, hidden, layer, past
from models.graphs import capture, dynamic, node, table
from torch import Tensor, nn

from kvpass.graph.dataflow import Flow
from kvpass.terms import CacheForm, Layout, Phase


def grown(
    cat: Callable[[Tensor, Tensor], Tensor], other: Callable[[Tensor, Tensor], Tensor] | None = None
) -> nn.Module:
    """A layer whose cache grows by `cat(past, new)`; values by `other`."""

    def forward(self, x, cache):
        q, k, v = self.project(x)
        k, v = cat(cache[0], k), (other or cat)(cache[1], v)
        return self.finish(attend(q, k, v)), (k, v)

    return layer(forward)


SPELLINGS = {
    "list": lambda a, b: torch.cat([a, b], 2),
    "tuple": lambda a, b: torch.cat((a, b), dim=-2),
    "concat": lambda a, b: torch.concat([a, b], dim=2),
    "concatenate": lambda a, b: torch.concatenate([a, b], 2),
    "keywords": lambda a, b: torch.cat(tensors=[a, b], dim=2),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("length", "phase"), [(1, Phase.DECODE), (3, Phase.EXTEND)])
def test_fires(spelling, length, phase):
    (site,) = table(grown(SPELLINGS[spelling]), hidden(length), past()).sites
    assert site.phase is phase
    assert (site.key.update.form, site.key.update.past.name) == (CacheForm.CONCAT, "l_cache_0_")
    assert site.dims == {"B": 2, "Hq": 4, "Hkv": KV_HEADS, "S": length, "D": 8, "Dv": 8}


@pytest.mark.parametrize("empty", [lambda: past(0), lambda: (torch.tensor([]), torch.tensor([]))])
def test_an_empty_past_is_a_prefill(empty):
    (site,) = table(grown(SPELLINGS["list"]), hidden(4), empty()).sites
    assert (site.phase, site.key.update.form, site.key.update.past) == (Phase.PREFILL, CacheForm.EMPTY, None)


def test_tokens_before_heads():
    def forward(self, x, cache):
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
        y = attend(*(t.transpose(1, 2) for t in (q, k, v)))
        return self.finish(y), (k, v)

    (site,) = table(layer(forward), hidden(), past(tokens_first=True)).sites
    assert (site.key.layout, site.value.layout) == (Layout.BTHD, Layout.BTHD)


def test_keys_and_values_may_lie_differently():
    def forward(self, x, cache):
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v.transpose(1, 2)], 1)
        return self.finish(attend(q, k, v.transpose(1, 2))), (k, v)

    cache = past()[0], past(tokens_first=True)[1]
    (site,) = table(layer(forward), hidden(), cache).sites
    assert (site.key.layout, site.value.layout) == (Layout.BHTD, Layout.BTHD)


def test_module_attributes():
    def forward(self, x):
        q, k, v = self.project(x)
        if self.cache is not None:
            k, v = torch.cat([self.cache[0], k], 2), torch.cat([self.cache[1], v], 2)
        self.cache = (k, v)
        return self.finish(attend(q, k, v))

    (first,) = table(layer(forward, cache=None), hidden(4)).sites
    (second,) = table(layer(forward, cache=past()), hidden(1)).sites
    assert (first.phase, first.key.update.form) == (Phase.PREFILL, CacheForm.RETURNED)
    assert (second.phase, second.key.update.form) == (Phase.DECODE, CacheForm.CONCAT)


def test_a_cache_returned_twice():
    def forward(self, x, cache):
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        return self.finish(attend(q, k, v)), (k, v), [k, v, k]

    (site,) = table(layer(forward), hidden(), past()).sites
    assert len(site.key.places) + len(site.value.places) >= 2


def test_lengths_of_the_cache_may_be_read():
    def forward(self, x, cache):
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        return self.finish(attend(q, k, v)) * k.shape[2] + cache[0].shape[2] + v.size(2), (k, v)

    cache = tuple(dynamic(t, 2) for t in past())
    assert table(layer(forward), hidden(), cache).sites


REFUSED = {
    "new tokens first": (lambda a, b: torch.cat([b, a], 2), "NEW_FIRST", "the input comes second"),
    "past computed": (lambda a, b: torch.cat([a * 0.5, b], 2), "PAST_NOT_INPUT", "mul"),
    "past cut": (lambda a, b: torch.cat([a[:, :, 1:], b], 2), "PAST_NOT_INPUT", "getitem"),
    "three parts": (lambda a, b: torch.cat([a[:, :, :2], a[:, :, 2:], b], 2), "UNSUPPORTED_UPDATE", "3 parts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    cat, reason, what = REFUSED[name]
    (found,) = table(grown(cat), hidden(), past()).declined
    assert (found.reason, found.node) == (reason, "k_2")
    assert what in found.detail
    assert "test_cache_concat.py" in found.source
    assert "torch.cat" in found.source


def test_a_wrong_axis():
    def forward(self, x, cache):
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
        return self.finish(attend(q, k, v)), (k, v)

    (found,) = table(layer(forward), hidden(5), past()).declined
    assert (found.reason, found.detail) == ("CAT_AXIS", "cat along axis 1 of BHTD")
    assert found.node == "k_2"


def test_keys_cached_and_values_not():
    (found,) = table(grown(SPELLINGS["list"], lambda a, b: a + b), hidden(5), past()).declined
    assert (found.reason, found.detail) == (
        "UNSUPPORTED_UPDATE",
        "v_2 is made of l_cache_1_ by add",
    )


def test_keys_that_are_their_own_values():
    def forward(self, x, cache):
        q, k, _ = self.project(x)
        k = torch.cat([cache, k], 2)
        return self.finish(attend(q, k, k)), k

    (found,) = table(layer(forward), hidden(), past()[0]).declined
    assert (found.reason, found.detail) == ("KEY_VALUE_MISMATCH", "keys and values are one tensor")


def test_one_cache_for_two_attentions():
    def forward(self, x, cache):
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        return self.finish(attend(q, k, v) - attend(q * 2, k, v)), (k, v)

    found = table(layer(forward), hidden(), past())
    assert not found.sites
    assert {d.reason for d in found.declined} == {"SHARED_CACHE"}
    assert len(found.declined) == 2


def leaking(read: Callable[[Any, Tensor, Tensor, Tensor, Tensor], Any]) -> nn.Module:
    """A layer with one more reader of (past K, K, past V, V)."""

    def forward(self, x, cache):
        q, k, v = self.project(x)
        grown_k, grown_v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        y = self.finish(attend(q, grown_k, grown_v))
        return y, (grown_k, grown_v), read(self, cache[0], grown_k, cache[1], grown_v)

    return layer(forward)


LEAKS = {
    "keys": (lambda self, pk, k, pv, v: k.mean(), "KEY_ESCAPES", "grown_k also feeds mean"),
    "values": (lambda self, pk, k, pv, v: v.sum(), "VALUE_ESCAPES", "grown_v also feeds sum_1"),
    "a returned view": (lambda self, pk, k, pv, v: k.transpose(1, 2), "KEY_ESCAPES", "also feeds transpose"),
    "past keys": (lambda self, pk, k, pv, v: pk.amax(), "KEY_ESCAPES", "also feeds amax"),
    "past values": (lambda self, pk, k, pv, v: pv + 1, "VALUE_ESCAPES", "also feeds"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_somebody_else_reads_it(name):
    read, reason, what = LEAKS[name]
    (found,) = table(leaking(read), hidden(), past()).declined
    assert found.reason == reason
    assert what in found.detail
    assert "test_cache_concat.py" in found.source


def test_the_view_that_the_attention_reads_is_returned():
    def forward(self, x, cache):
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        wide = k.repeat_interleave(2, 1)
        return self.finish(attend(q, wide, v)), (k, v), wide

    (found,) = table(layer(forward), hidden(), past()).declined
    assert found.reason == "UNSUPPORTED_UPDATE"
    assert "repeat_interleave of it" in found.detail


def test_new_keys_changed_after_they_were_cached():
    def forward(self, x, cache):
        q, k, v = self.project(x)
        grown_k, grown_v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        k.mul_(2)
        return self.finish(attend(q, grown_k, grown_v)), (grown_k, grown_v), k.sum()

    (found,) = table(layer(forward), hidden(), past()).declined
    assert (found.reason, found.detail) == ("UNSUPPORTED_UPDATE", "k_1 is changed after it was cached")


def test_new_keys_changed_before_they_are_cached_are_fine():
    def forward(self, x, cache):
        q, k, v = self.project(x)
        k.mul_(2)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        return self.finish(attend(q, k, v)), (k, v)

    assert table(layer(forward), hidden(), past()).sites


def test_another_batch_of_keys():
    def forward(self, x, cache):
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k[:1]], 2), torch.cat([cache[1], v[:1]], 2)
        return self.finish(attend(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1))), (k, v)

    (found,) = table(layer(forward), hidden(), past(batch=1)).declined
    assert found.reason == "LAYOUT"


def test_other_heads_of_values():
    def forward(self, x, cache):
        q, k, v = self.project(x)
        v = v.repeat_interleave(2, 1)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        return self.finish(attend(q, k.repeat_interleave(2, 1), v)), (k, v)

    (found,) = table(layer(forward), hidden(), (past()[0], torch.randn(2, 4, 5, 8))).declined
    assert (found.reason, found.detail) == ("KEY_VALUE_MISMATCH", "2 heads of keys, 4 of values")


def test_a_cat_that_is_not_returned_is_no_update():
    gm = capture(lambda a, b: torch.cat([a, b], 2).sum(), *past())
    assert ConcatUpdate().match(node(gm, "cat"), Flow(gm.graph)) is None
