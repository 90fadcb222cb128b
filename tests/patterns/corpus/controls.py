"""Next neighbours of the cases that are refused: these are attention with a cache, and are rewritten."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from corpus.case import MATCHED, case, eager, grow, logits, prompt, wide
from models.attention import DIM, HEADS, KV_HEADS, WIDTH, attend, hidden, past
from models.plain import rotary
from torch import nn


@case(MATCHED)
def written_out(self, x, cache):
    """The base of all cases of forms.py."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    return self.finish(eager(q, k, v)), (k, v)


@case(MATCHED, prompt)
def first_call_written_out(self, x):
    """Its first call."""
    q, k, v = self.project(x)
    return self.finish(eager(q, k, v)), (k, v)


@case(MATCHED)
def cosine(self, x, cache):
    """Normalised before the cache."""
    q, k, v = self.project(x)
    k, v = grow(cache, F.normalize(k, dim=-1), v)
    return self.finish(attend(F.normalize(q, dim=-1), k, v, scale=10.0)), (k, v)


@case(MATCHED)
def rotated_before_the_cache(self, x, cache):
    """RoPE at the true position."""
    q, k, v = self.project(x)
    k, v = grow(cache, rotary(k, 5), v)
    return self.finish(attend(rotary(q, 5), k, v)), (k, v)


@case(MATCHED, lambda: (hidden(4, batch=4), past(batch=4)), lambda: {"rows": nn.Parameter(torch.randn(HEADS))})
def sinks_of_each_head(self, x, cache):
    """One sink logit for each query head."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    wide_k, wide_v = wide(k, v)
    scores = logits(q, wide_k)
    scores = torch.cat([scores, self.rows.view(1, HEADS, 1, 1).expand(4, -1, 4, 1)], -1)
    return self.finish(scores.softmax(-1)[..., :-1] @ wide_v), (k, v)


@case(MATCHED, parts=lambda: {"s": nn.Linear(WIDTH, HEADS)})
def sharpness_on_the_queries(self, x, cache):
    """A temperature from the input is no harm where it belongs to the queries."""
    q, k, v = self.project(x)
    q = q * self.s(x).exp().transpose(1, 2)[..., None]
    k, v = grow(cache, k, v)
    return self.finish(eager(q, k, v)), (k, v)


@case(MATCHED)
def dropout_in_eval(self, x, cache):
    """Dropout that does nothing."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    wide_k, wide_v = wide(k, v)
    return self.finish(F.dropout(logits(q, wide_k).softmax(-1), 0.3, self.training) @ wide_v), (k, v)


@case(MATCHED, parts=lambda: {"a": nn.LayerNorm(WIDTH), "b": nn.LayerNorm(WIDTH)})
def queries_and_keys_normed_apart(self, x, cache):
    """Two norms of one sequence: self-attention all the same."""
    q, k, v = self.q(self.a(x)), self.k(self.b(x)), self.v(self.b(x))
    q, k, v = (t.view(2, 1, -1, 8).transpose(1, 2) for t in (q, k, v))
    k, v = grow(cache, k, v)
    return self.finish(attend(q, k, v)), (k, v)


@case(MATCHED)
def keys_and_values_from_one_projection(self, x, cache):
    """A cat along the features that is split again, next to the cache's."""
    q, k, v = self.project(x)
    k, v = torch.cat([k, v], -1).chunk(2, -1)
    k, v = grow(cache, k, v)
    return self.finish(attend(q, k, v)), (k, v)


@case(MATCHED)
def prefix_put_in_front_of_the_cache(self, x, cache):
    """Learned keys that are not cached: the attention reads more keys than there are slots, at shifted columns."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    extra = self.q.weight[:6, :DIM].view(1, 1, 6, DIM).expand(2, KV_HEADS, -1, -1)
    return self.finish(attend(q, torch.cat([extra, k], 2), torch.cat([extra, v], 2))), (k, v)
