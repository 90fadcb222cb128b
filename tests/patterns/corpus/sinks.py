"""Logits in one more column, which are no sinks of the heads."""

from __future__ import annotations

import torch
from corpus.case import case, grow, logits, wide
from models.attention import WIDTH, hidden, past
from torch import nn

KIND = "UNSUPPORTED_ATTENTION"


def one_sink():
    return {"rows": nn.Parameter(torch.randn(4)), "s": nn.Linear(WIDTH, 1)}


def four():
    return hidden(4, batch=4), past(batch=4)


def with_sinks(sinks, cut):
    def forward(self, x, cache):
        q, k, v = self.project(x)
        k, v = grow(cache, k, v)
        wide_k, wide_v = wide(k, v)
        scores = logits(q, wide_k)
        weights = torch.cat([scores, sinks(self, x).expand(*scores.shape[:3], 1)], -1).softmax(-1)
        return self.finish(cut(weights) @ wide_v), (k, v)

    return forward


def sink_register(name, doc, outcome, sinks, cut=lambda w: w[..., :-1]):
    forward = with_sinks(sinks, cut)
    forward.__name__, forward.__doc__ = name, doc
    case(outcome, four, one_sink)(forward)


sink_register(
    "sinks_of_each_query", "As many queries as heads: one sink each.", KIND, lambda s, x: s.rows.view(1, 1, 4, 1)
)
sink_register(
    "sinks_of_each_row", "As many sequences as heads: one sink each.", KIND, lambda s, x: s.rows.view(4, 1, 1, 1)
)
sink_register(
    "sinks_from_the_input",
    "The sink is data.",
    KIND,
    lambda s, x: s.s(x.mean(1)).view(-1, 1, 1, 1),
)
sink_register(
    "sinks_cut_at_the_wrong_end",
    "The first key is dropped, and the sink's probability meets the last value.",
    KIND,
    lambda s, x: s.rows.view(1, 4, 1, 1),
    lambda w: w[..., 1:],
)
