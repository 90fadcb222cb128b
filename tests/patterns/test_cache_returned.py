"""First calls: the new K and V are themselves returned as the cache."""

from __future__ import annotations

import pytest
import torch
from models.attention import WIDTH, attend, hidden, layer
from models.graphs import outcome, table
from models.plain import rotary

from kvpass.terms import CacheForm, Layout, Phase


def test_fires_under_any_rotation():
    def forward(self, x):
        q, k, v = self.project(x)
        k = rotary(k, 0)  # ends in a cat, which is no cache
        return self.finish(attend(rotary(q, 0), k, v, is_causal=True)), (k, v)

    (site,) = table(layer(forward), hidden(4)).sites
    assert (site.phase, site.key.update.form) == (Phase.PREFILL, CacheForm.RETURNED)
    assert site.key.update.node is site.key.update.new


def test_tokens_before_heads():
    def forward(self, x):
        q, k, v = self.project(x)
        k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        return self.finish(attend(q, k.transpose(1, 2), v.transpose(1, 2))), (k, v)

    (site,) = table(layer(forward), hidden(4)).sites
    assert site.key.layout is Layout.BTHD


def test_other_readers_of_new_keys_are_fine():
    """They read the keys of this call, which are all there."""

    def forward(self, x):
        q, k, v = self.project(x)
        return self.finish(attend(q, k, v)) + k.mean(), (k, v)

    assert outcome(layer(forward), hidden(4)) == "prefill"


def test_changed_after_the_attention():
    def forward(self, x):
        q, k, v = self.project(x)
        k = k.contiguous()
        y = attend(q, k, v)
        k.zero_()
        return self.finish(y), (k, v)

    assert outcome(layer(forward), hidden(4)) == "UNSUPPORTED_UPDATE"


def test_only_keys_returned():
    def forward(self, x):
        q, k, v = self.project(x)
        return self.finish(attend(q, k, v)), k

    (found,) = table(layer(forward), hidden(4)).declined
    assert (found.reason, found.detail) == (
        "KEY_VALUE_MISMATCH",
        "keys are this call's alone, and returned, values are not cached",
    )


def test_cross_attention_of_another_length():
    def forward(self, x, memory):
        q, k, v = self.project(x, memory)
        return self.finish(attend(q, k, v)), (k, v)

    (found,) = table(layer(forward), hidden(4), hidden(7)).declined
    assert (found.reason, found.detail) == ("CROSS_ATTENTION", "4 queries but 7 new keys")


def test_cross_attention_of_the_same_length():
    def forward(self, x, memory):
        q, k, v = self.project(x, memory)
        return self.finish(attend(q, k, v)), (k, v)

    (found,) = table(layer(forward), hidden(4), hidden(4)).declined
    assert (found.reason, found.detail) == (
        "CROSS_ATTENTION",
        "queries and keys are projected from different inputs",
    )


@pytest.mark.parametrize("length", [1, 3])
def test_cross_attention_with_a_cache_that_grows(length):
    def forward(self, x, memory, cache):
        q, k, v = self.project(x, memory)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        return self.finish(attend(q, k, v)), (k, v)

    cache = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    assert outcome(layer(forward), hidden(length), hidden(length), cache) == "CROSS_ATTENTION"


def test_projections_by_einsum():
    weight = torch.randn(3, WIDTH, 4, 8)

    def call(x, memory):
        q = torch.einsum("btc,chd->bhtd", x, weight[0])
        k, v = (torch.einsum("btc,chd->bhtd", memory, w) for w in weight[1:])
        return attend(q, k, v), k, v

    x = hidden(4)
    assert outcome(lambda x: call(x, x), x) == "prefill"
    assert outcome(call, x, hidden(4)) == "CROSS_ATTENTION"


def test_keys_of_low_rank():
    """k = up(down(x)): the input of q is two projections above k."""

    def forward(self, x):
        q, _, v = self.project(x)
        k = (x @ self.down @ self.up).view(2, -1, 2, 8).transpose(1, 2)
        return self.finish(attend(q, k, v)), (k, v)

    parts = {"down": torch.nn.Parameter(torch.randn(WIDTH, 4)), "up": torch.nn.Parameter(torch.randn(4, 16))}
    assert outcome(layer(forward, **parts), hidden(4)) == "prefill"
