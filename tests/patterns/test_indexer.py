"""Sparse indexers: a third cache, of keys that only choose which tokens the attention sees, stays dense by choice."""

from __future__ import annotations

import pytest
import torch
from models.attention import DIM, WIDTH, attend, hidden, layer, lenient, past
from models.graphs import table
from torch import nn

import kvpass

SEEN = 6


def places(scores):
    return scores.topk(SEEN).indices


def sparse(choose, extra=lambda keys: 0.0):
    def forward(self, x, cache):
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        keys = torch.cat([cache[2], self.index(x)], 1)
        scores = torch.relu(x[..., :DIM] @ keys.transpose(1, 2))
        hidden = torch.ones_like(scores, dtype=torch.bool).scatter(-1, choose(scores), False)
        out = attend(q, k, v, attn_mask=~hidden[:, None])
        return self.finish(out) + extra(keys), (k, v, keys)

    torch.manual_seed(1)
    return layer(forward, index=nn.Linear(WIDTH, DIM))


def inputs():
    torch.manual_seed(4)
    return hidden(), (*past(7), torch.randn(2, 7, DIM))


@pytest.mark.parametrize(
    "choose",
    [
        places,
        lambda s: torch.topk(s, SEEN)[1],
        lambda s: s.argsort(-1, descending=True)[..., :SEEN],
        lambda s: s.sort(descending=True).indices[..., :SEEN],
    ],
)
def test_indexer_stays_dense_by_choice(choose):
    found = table(sparse(choose), *inputs())
    assert len(found.sites) == 1
    assert [d.reason for d in found.declined] == ["INDEXER"]
    assert not found.failed


@pytest.mark.parametrize(
    "model",
    [
        sparse(lambda s: (s.topk(SEEN).values > 0).long()),
        sparse(lambda s: (lambda top: top.indices + (top.values < 0))(s.topk(SEEN))),
        sparse(lambda s: places(s.softmax(-1))),
        sparse(places, lambda keys: keys.sum()),
        sparse(lambda s: (s > 0).long()),
    ],
    ids=["values", "places and values", "softmax", "feeds the output", "no choice"],
)
def test_not_an_indexer(model):
    found = table(model, *inputs())
    assert "INDEXER" not in {d.reason for d in found.declined}
    with torch.no_grad():
        prompt = hidden(8), (*past(0), torch.zeros(2, 0, DIM))
        torch.testing.assert_close(lenient(model, "full", 1.0)(*prompt)[0], model(*prompt)[0])


@pytest.mark.parametrize(
    "choose",
    [
        lambda s: (s > s.topk(SEEN).values[..., -1:]).long(),
        lambda s: torch.zeros_like(s).long().scatter_add(-1, places(s), torch.ones_like(places(s))),
    ],
)
def test_a_choice_in_another_form_is_refused(choose):
    """Whether a token is padding cannot be told from such a mask."""

    def forward(self, x, cache):
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        scores = torch.relu(x[..., :DIM] @ torch.cat([cache[2], self.index(x)], 1).transpose(1, 2))
        return self.finish(attend(q, k, v, attn_mask=choose(scores)[:, None] > 0)), (k, v)

    torch.manual_seed(1)
    found = table(layer(forward, index=nn.Linear(WIDTH, DIM)), *inputs())
    assert not found.sites
    assert {d.reason for d in found.declined} == {"MASK_UNKNOWN"}


@pytest.mark.parametrize("policy", ["full", "streaming_llm"])
def test_what_is_chosen_is_kept_by_position(policy):
    """streaming_llm keeps the first 4 and the last of 20 tokens: those of them that the indexer chooses are seen."""
    model = sparse(lambda s: s.topk(min(SEEN, s.shape[-1])).indices)
    torch.manual_seed(9)
    x, empty = hidden(20), (*past(0), torch.zeros(2, 0, DIM))
    compiled = kvpass.compile(model, policy, 8 if policy != "full" else 1.0, inner="eager")
    with torch.no_grad():
        first, cache = compiled(x, empty)
        expected, dense = model(x, empty)
        torch.testing.assert_close(first, expected)
        step = hidden()
        torch.testing.assert_close(cache[2], dense[2])
        got, _ = compiled(step, cache)
        kept = torch.tensor([0, 1, 2, 3, *range(16 if policy != "full" else 4, 20), 20])
        torch.testing.assert_close(got, over(model, step, dense, kept))


def over(model, x, cache, kept):
    """One step in which only the kept positions are there."""
    q, k, v = model.project(x)
    k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
    keys = torch.cat([cache[2], model.index(x)], 1)
    chosen = torch.relu(x[..., :DIM] @ keys.transpose(1, 2)).topk(SEEN).indices
    seen = torch.zeros(2, 1, 21, dtype=torch.bool).scatter(-1, chosen, True)
    return model.finish(attend(q, k[:, :, kept], v[:, :, kept], attn_mask=seen[:, None, :, kept]))
