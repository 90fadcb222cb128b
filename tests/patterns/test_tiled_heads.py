"""KV heads that are tiled (JetMoE): query head h reads KV head h % 2. The ops want those of one KV head together."""

from __future__ import annotations

import pytest
import torch
from models.attention import DIM, HEADS, KV_HEADS, attend, hidden, layer, past
from models.graphs import table
from torch import nn

import kvpass

GROUP = HEADS // KV_HEADS
ORDER = [0, 2, 1, 3]  # its own inverse


def tiled(k):
    return k.repeat(1, GROUP, 1, 1)


def by_group(k):
    return k.repeat_interleave(GROUP, 1)


def written_out(q, k, v, bias, sinks):
    logits = q @ k.transpose(2, 3) * DIM**-0.5 + bias
    logits = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
    return logits.softmax(-1)[..., :-1] @ v


def in_one_axis(q, k, v, bias, sinks):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    logits = torch.bmm(q, k.transpose(1, 2)) + bias.expand(2, -1, -1, -1).flatten(0, 1)
    return torch.bmm(logits.softmax(-1), v).unflatten(0, (2, HEADS))


def fused(q, k, v, bias, sinks):
    return attend(q, k, v, attn_mask=bias, enable_gqa=False)


def model(attention, spread, order=None):
    def forward(self, x, cache):
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        far = torch.arange(k.shape[2]) - torch.arange(k.shape[2] - x.shape[1], k.shape[2])[:, None]
        bias = (self.slope.view(1, -1, 1, 1) * far).masked_fill(far > 0, float("-inf"))
        given = (q, bias, self.sinks)
        q, bias, sinks = given if order is None else (q[:, order], bias[:, order], self.sinks[order])
        y = attention(q, spread(k), spread(v), bias, sinks)
        return self.finish(y if order is None else y[:, order]), (k, v)

    torch.manual_seed(2)
    parts = {name: nn.Parameter(torch.rand(HEADS)) for name in ("slope", "sinks")}
    return layer(forward, **parts)


@pytest.mark.parametrize("attention", [fused, written_out, in_one_axis])
@pytest.mark.parametrize("policy", ["full", "h2o"])
def test_the_same_as_heads_in_the_other_order(attention, policy):
    ours, theirs = model(attention, tiled), model(attention, by_group, ORDER)
    compiled = [kvpass.compile(each, policy, 8 if policy == "h2o" else 1.0, inner="eager") for each in (ours, theirs)]
    torch.manual_seed(7)
    caches = [past(0), past(0), past(0)]
    for x in (hidden(12), hidden(3), hidden(), hidden()):
        with torch.no_grad():
            (got, caches[0]), (expected, caches[1]) = compiled[0](x, caches[0]), compiled[1](x, caches[1])
            dense, caches[2] = ours(x, caches[2])
        torch.testing.assert_close(got, expected)
        if policy == "full":
            torch.testing.assert_close(got, dense)


def test_one_of_the_two_tiled():
    def mixed(q, k, v, bias, sinks):
        return attend(q, tiled(k), by_group(v), attn_mask=bias, enable_gqa=False)

    (found,) = table(model(mixed, lambda t: t), hidden(), past()).declined
    assert found.reason == "GROUP_ORDER"
