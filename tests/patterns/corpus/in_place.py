"""A cache that grows as it should, and something that is changed in place at the wrong time."""

from __future__ import annotations

import torch
from corpus.case import case, grow, logits, wide
from models.attention import DIM, KV_HEADS, attend, hidden, past

K = "KEY_ESCAPES"


@case(K)
def past_changed_in_place(self, x, cache):
    """Old keys fade."""
    q, k, v = self.project(x)
    cache[0].mul_(0.9)
    k, v = grow(cache, k, v)
    return self.finish(attend(q, k, v)), (k, v)


@case(K)
def cache_changed_in_place(self, x, cache):
    """The keys fade after the cat, in place."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    k.mul_(0.9)
    return self.finish(attend(q, k, v)), (k, v)


@case(K)
def cache_changed_after_the_attention(self, x, cache):
    """What is stored is not what was read."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    y = attend(q, k, v)
    k[:, :, 0] = 0
    return self.finish(y), (k, v)


@case("UNSUPPORTED_UPDATE")
def new_keys_changed_through_a_view(self, x, cache):
    """The cache took a copy of the keys before they were doubled."""
    q, k, v = self.project(x)
    grown = grow(cache, k, v)
    k.transpose(1, 2).mul_(2)
    return self.finish(attend(q, *grown)), grown


@case("UNSUPPORTED_UPDATE")
def new_keys_changed_through_their_base(self, x, cache):
    """A scratch buffer is cleared: the new keys are a view of it."""
    q, _, v = self.project(x)
    scratch = self.k(x)
    k = scratch.view(2, -1, KV_HEADS, DIM).transpose(1, 2)
    grown = grow(cache, k, v)
    scratch.zero_()
    return self.finish(attend(q, *grown)), grown


@case("UNSUPPORTED_ATTENTION")
def queries_changed_after_their_product(self, x, cache):
    """Scratch memory again: the queries are gone before the values are read."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    wide_k, wide_v = wide(k, v)
    scores = logits(q, wide_k)
    q.zero_()
    return self.finish(scores.softmax(-1) @ wide_v), (k, v)


@case("UNSUPPORTED_ATTENTION", lambda: (hidden(), past(), torch.randn(2, 1, 1, 6)))
def mask_changed_after_its_use(self, x, cache, mask):
    """The bias is added, then cleared for the next layer."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    wide_k, wide_v = wide(k, v)
    scores = logits(q, wide_k) + mask
    mask.zero_()
    return self.finish(scores.softmax(-1) @ wide_v), (k, v)
