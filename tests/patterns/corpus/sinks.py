"""Logits in one more column, and gates behind the softmax: sinks of the heads, and what only looks like them."""

from __future__ import annotations

import torch
from corpus.case import MATCHED, case, grow, logits, wide
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


def gated(gate):
    def forward(self, x, cache):
        q, k, v = self.project(x)
        k, v = grow(cache, k, v)
        wide_k, wide_v = wide(k, v)
        scores = logits(q, wide_k)
        return self.finish(scores.softmax(-1) @ wide_v * gate(self, scores).unsqueeze(-1)), (k, v)

    return forward


def gate_register(name, doc, outcome, gate):
    forward = gated(gate)
    forward.__name__, forward.__doc__ = name, doc
    case(outcome, four, one_sink)(forward)


gate_register(
    "gate_of_each_head",
    "sigmoid(logsumexp - sinks) behind the attention is the share that sinks leave.",
    MATCHED,
    lambda s, w: torch.sigmoid(w.logsumexp(-1) - s.rows.view(1, -1, 1)),
)
gate_register(
    "gate_the_other_way",
    "The share of the sinks themselves.",
    KIND,
    lambda s, w: torch.sigmoid(s.rows.view(1, -1, 1) - w.logsumexp(-1)),
)
gate_register(
    "gate_of_each_query",
    "As many queries as heads: one sink each.",
    KIND,
    lambda s, w: torch.sigmoid(w.logsumexp(-1) - s.rows.view(1, 1, -1)),
)
gate_register(
    "gate_over_the_queries",
    "Summed over the queries (as many as heads), not the keys.",
    KIND,
    lambda s, w: torch.sigmoid(w[..., :4].logsumexp(-2) - s.rows.view(1, -1, 1)),
)
gate_register(
    "gate_of_other_logits",
    "Of logits twice as large as the softmax has.",
    KIND,
    lambda s, w: torch.sigmoid((2 * w).logsumexp(-1) - s.rows.view(1, -1, 1)),
)
gate_register(
    "gate_twice",
    "Sinks that take more than their share.",
    KIND,
    lambda s, w: torch.sigmoid(2 * (w.logsumexp(-1) - s.rows.view(1, -1, 1))),
)
gate_register(
    "gate_of_changed_logits",
    "The softmax has read what is doubled afterwards.",
    KIND,
    lambda s, w: torch.sigmoid(w.mul_(2).logsumexp(-1) - s.rows.view(1, -1, 1)),
)
