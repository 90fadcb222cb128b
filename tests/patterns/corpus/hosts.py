"""Hosts that do with a cache, between two calls, what no single graph shows."""

from __future__ import annotations

import math

import torch
from corpus.case import conversation, eager, grow, logits, wide
from models.attention import DIM, HEADS, KV_HEADS, attend, hidden
from torch import nn


def plain(self, x, cache=None, mask=None):
    q, k, v = self.project(x)
    k, v = (k, v) if cache is None else grow(cache, k, v)
    return self.finish(attend(q, k, v, attn_mask=mask)), (k, v)


@conversation(plain, quiet=True)
def well_behaved(call):
    """Prompt and three tokens."""
    y, cache = call(hidden(6))
    yield y
    for _ in range(3):
        y, cache = call(hidden(), cache)
        yield y


@conversation(plain, quiet=True)
def prompt_of_one_token(call):
    """The first call has one query too."""
    y, cache = call(hidden())
    yield y
    for _ in range(3):
        y, cache = call(hidden(), cache)
        yield y


@conversation(plain, quiet=True)
def two_conversations_at_once(call):
    """One compiled model, two caches in turn."""
    caches = []
    for length in (4, 7):
        y, cache = call(hidden(length))
        caches.append(cache)
        yield y
    for turn in range(6):
        y, caches[turn % 2] = call(hidden(), caches[turn % 2])
        yield y


@conversation(plain)
def keys_and_values_change_places(call):
    """What came back as keys is given as values."""
    y, (k, v) = call(hidden(6))
    yield y
    yield call(hidden(), (v, k))[0]


@conversation(plain)
def newest_token_hidden_from_itself(call):
    """A strictly causal mask: every token is seen by all later ones, but not by itself."""
    y, cache = call(hidden(6), None, torch.ones(6, 6, dtype=torch.bool).tril(-1) | (torch.arange(6) == 0))
    yield y
    for seen in range(6, 9):
        y, cache = call(hidden(), cache, (torch.arange(seen + 1) < seen)[None])
        yield y


@conversation(plain)
def shown_only_later(call):
    """Two tokens of the prompt that nobody sees in the first call, and everybody in the second."""
    y, cache = call(hidden(6), None, (torch.arange(6) > 1).expand(6, 6))
    yield y
    yield call(hidden(), cache, torch.ones(1, 7, dtype=torch.bool))[0]


@conversation(plain)
def shown_only_later_to_several(call):
    """The same, where the second call has two tokens."""
    y, cache = call(hidden(6), None, (torch.arange(6) > 1).expand(6, 6))
    yield y
    yield call(hidden(2), cache, torch.ones(2, 8, dtype=torch.bool))[0]


@conversation(plain)
def padding_forgotten(call):
    """A padded prompt, and no mask from then on."""
    y, cache = call(hidden(6), None, (torch.arange(6) > 1).expand(6, 6))
    yield y
    yield call(hidden(), cache)[0]


@conversation(plain)
def rows_change_places(call):
    """The batch is reordered."""
    y, cache = call(hidden(6))
    yield y
    yield call(hidden(), tuple(t.flip(0) for t in cache))[0]


@conversation(plain)
def last_token_taken_back(call):
    """Crop by one."""
    y, cache = call(hidden(6))
    yield y
    yield call(hidden(), tuple(t[:, :, :-1] for t in cache))[0]


@conversation(plain)
def first_token_taken_out(call):
    """Crop at the other end, then pad to the old length with the last token."""
    y, cache = call(hidden(6))
    yield y
    cache = tuple(torch.cat([t[:, :, 1:], t[:, :, -1:]], 2) for t in cache)
    yield call(hidden(), cache)[0]


@conversation(plain)
def kept_in_half_precision(call):
    """Stored in bfloat16 between the calls."""
    y, cache = call(hidden(6))
    yield y
    yield call(hidden(), tuple(t.bfloat16().float() for t in cache))[0]


@conversation(plain)
def one_branch_after_the_other(call):
    """The same cache continued twice: the second branch must not see the first one's token."""
    _, cache = call(hidden(6))
    for _ in range(2):
        yield call(hidden(), cache)[0]


def two_layers(self, x, first, second):
    y, first = plain(self, x, first)
    y, second = plain(self, y, second)
    return y, first, second


@conversation(two_layers)
def one_cache_for_two_layers(call):
    """Views of one pair, given to both layers."""
    y, first, _ = call(hidden(6), None, None)
    yield y
    yield call(hidden(), first, tuple(t[:] for t in first))[0]


@torch._dynamo.disable
def norm_outside(k):
    return k.norm()


def watched(self, x, cache=None):
    y, cache = plain(self, x, cache)
    return y * norm_outside(cache[0]), cache


@conversation(watched, nan=True)
def keys_read_between_two_graphs(call):
    """A function that Dynamo leaves alone reads the keys of a first call. They leave a graph as a cache does, and what
    happens to them between two graphs nobody tells: decoders with a graph break in each layer look the same.
    """
    y, cache = call(hidden(6))
    yield y
    yield call(hidden(), cache)[0]


def cross(self, x, memory, cache=None):
    """No projection tells q from k."""
    q = x.view(2, -1, HEADS, DIM).transpose(1, 2)
    if cache is None:
        k = memory.view(2, -1, HEADS, DIM).transpose(1, 2)
        cache = k * self.q.bias[:DIM], k * self.o.bias[:DIM]
    return attend(q, *cache, enable_gqa=False), cache


@conversation(cross)
def source_of_the_targets_length(call):
    """Cross attention whose cache is made once and only read afterwards."""
    memory = hidden(6)
    y, cache = call(hidden(6), memory)
    yield y
    yield call(hidden(), memory, cache)[0]


def scaled(scale):
    def forward(self, x, cache=None):
        q, k, v = self.project(x)
        k, v = (k, v) if cache is None else grow(cache, k, v)
        wide_k, wide_v = wide(k, v)
        return self.finish((scale(q @ wide_k.transpose(-1, -2), wide_k)).softmax(-1) @ wide_v), (k, v)

    return forward


def talk(call):
    """Prompt and five tokens."""
    y, cache = call(hidden(6))
    yield y
    for _ in range(5):
        y, cache = call(hidden(), cache)
        yield y


def register(name, forward, **options):
    def host(call):
        yield from talk(call)

    host.__name__, host.__doc__ = name, talk.__doc__
    conversation(forward, **options)(host)


def root_in_place(scores, keys):
    scale = torch.full((), 64.0)
    scale.sqrt_()
    return scores / scale


register("scaled_by_zero", scaled(lambda s, k: s * 0.0))
register("scaled_by_a_constant_changed_in_place", scaled(root_in_place))
register("scaled_by_the_length", scaled(lambda s, k: s * (math.log(k.shape[2]) / 8)))
register("scaled_by_a_tensor_of_the_length", scaled(lambda s, k: s * torch.tensor(float(k.shape[2])).log() / 8))


def zero_keys(self, x, cache=None):
    q, k, v = self.project(x)
    k, v = (k, v) if cache is None else grow(cache, k, v)
    return self.finish(attend(q, k * 0.0, v)), (k, v)


register("keys_times_zero", zero_keys)


def prefixed(self, x, cache=None):
    q, k, v = self.project(x)
    cache = (self.prefix_k, self.prefix_v) if cache is None else cache
    k, v = grow(cache, k, v)
    return self.finish(eager(q, k, v)), (k, v)


def prefix():
    return {name: nn.Buffer(torch.randn(2, KV_HEADS, 3, DIM)) for name in ("prefix_k", "prefix_v")}


register("prefix_in_a_buffer", prefixed, parts=prefix)


def top_left(self, x, cache=None):
    q, k, v = self.project(x)
    k, v = (k, v) if cache is None else grow(cache, k, v)
    return self.finish(attend(q, k, v, is_causal=x.shape[1] > 1)), (k, v)


@conversation(top_left)
def causal_from_the_top_left(call):
    """A second turn with is_causal=True: in torch its queries see the first keys only."""
    y, cache = call(hidden(6))
    yield y
    yield call(hidden(4), cache)[0]


def softened(self, x, cache=None):
    q, k, v = self.project(x)
    k, v = (k, v) if cache is None else grow(cache, k, v)
    wide_k, wide_v = wide(k, v)
    scores = logits(q, wide_k)
    if x.shape[1] > 1:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -1e9)
    return self.finish(scores.sub(scores.amax(-1, keepdim=True)).softmax(-1) @ wide_v), (k, v)


register("row_maximum_taken_off", softened)


def cut_mask(self, x, cache=None):
    """transformers' eager attention: the mask is cut to the length of the repeated keys."""
    q, k, v = self.project(x)
    k, v = (k, v) if cache is None else grow(cache, k, v)
    wide_k, wide_v = wide(k, v)
    scores = logits(q, wide_k)
    length = wide_k.shape[-2]
    future = torch.full((x.shape[1], 32), torch.finfo(x.dtype).min).triu(length - x.shape[1] + 1)
    return self.finish((scores + future[None, None, :, :length]).softmax(-1) @ wide_v), (k, v)


register("length_of_the_repeated_keys_is_read", cut_mask, quiet=True)
