"""Caches of other sequences, of other attentions, or read where no graph sees it."""

from __future__ import annotations

import torch
from corpus.case import UNTOUCHED, case, eager, grow, step
from models.attention import DIM, attend, hidden, past
from torch import nn
from torch.utils.checkpoint import checkpoint


@case("CROSS_ATTENTION", lambda: (hidden(6), hidden(6)))
def encoder_decoder_first_call(self, x, memory):
    """As many source tokens as target tokens: their keys do not grow with the target."""
    q, k, v = self.project(x, memory)
    return self.finish(eager(q, k, v)), (k, v)


@case("CROSS_ATTENTION", lambda: (hidden(2), hidden(3), past()))
def streamed_source(self, x, memory, cache):
    """Speech: the source grows by three tokens while the target grows by two."""
    q, k, v = self.project(x, memory)
    k, v = grow(cache, k, v)
    return self.finish(eager(q, k, v)), (k, v)


@case("QUERY_COUNT", lambda: (hidden(6), past()))
def only_the_last_query(self, x, cache):
    """Six new keys, one query: positions of queries and keys do not run together."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    return self.finish(attend(q[:, :, -1:], k, v)), (k, v)


@case("QUERY_COUNT", lambda: (hidden(6), past()))
def queries_repeated(self, x, cache):
    """Two queries for each new key."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    return self.finish(attend(q.repeat_interleave(2, 2), k, v)), (k, v)


@case("SHARED_CACHE")
def two_attentions(self, x, cache):
    """Written out twice over one cache."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    return self.finish(eager(q, k, v) - eager(q.flip(1), k, v)), (k, v)


@case("SHARED_CACHE")
def one_written_out_and_one_called(self, x, cache):
    """Two spellings over one cache."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    return self.finish(eager(q, k, v) + attend(q, k, v)), (k, v)


@case("SHARED_CACHE", lambda: (hidden(), (*past(), past()[0])))
def two_keys_for_one_value(self, x, cache):
    """Differential attention: one cache of values, two of keys."""
    q, k, v = self.project(x)
    a, v = grow(cache, k, v)
    b = torch.cat([cache[2], k * 0.5 + 1], 2)
    return self.finish(eager(q, a, v) - eager(q, b, v)), (a, v, b)


@case(UNTOUCHED, lambda: (hidden(), past()))
def shared_by_layers(self, x, cache):
    """A layer that reads the cache of the layer below and adds nothing."""
    q, _, _ = self.project(x)
    return self.finish(attend(q, *cache)), cache


@case("LAYOUT", lambda: (hidden(), past(batch=1)))
def one_prompt_for_all_rows(self, x, cache):
    """Keys of one row, expanded over the batch."""
    q, k, v = self.project(x)
    k, v = grow(cache, k.mean(0, keepdim=True), v.mean(0, keepdim=True))
    return self.finish(eager(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1))), (k, v)


@torch.library.custom_op("corpus::attention", mutates_args=())
def opaque(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attend(q, k, v)


@opaque.register_fake
def _(q, k, v):
    return torch.empty_like(q)


@case("UNSUPPORTED_ATTENTION")
def somebody_elses_kernel(self, x, cache):
    """A custom op: nothing says what it computes."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    return self.finish(opaque(q, k, v)), (k, v)


@case("UNSUPPORTED_ATTENTION")
def inside_a_checkpoint(self, x, cache):
    """The attention is in a graph of its own, inside this one."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    return self.finish(checkpoint(attend, q, k, v, use_reentrant=False)), (k, v)


@case("UNSUPPORTED_ATTENTION", lambda: (*step(), torch.tensor(True)))
def inside_a_condition(self, x, cache, sharp):
    """Which attention reads the cache is decided at run time."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    y = torch.cond(sharp, lambda q, k, v: attend(q * 2, k, v), lambda q, k, v: attend(q, k, v), (q, k, v))
    return self.finish(y), (k, v)


@case("UNSUPPORTED_ATTENTION", step, lambda: {"mixer": nn.MultiheadAttention(16, 2, batch_first=True).eval()})
def projected_again(self, x, cache):
    """nn.MultiheadAttention projects what was cached."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    y, _ = self.mixer(q[:, :2].transpose(1, 2).flatten(2), k.transpose(1, 2).flatten(2), v.transpose(1, 2).flatten(2))
    return y, (k, v)


@case("KEY_ESCAPES")
def copied_to_another_cache(self, x, cache):
    """A draft model gets a copy of the keys, scaled."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    return self.finish(eager(q, k, v)), (k, v), k @ self.q.weight[:DIM, :DIM]
