"""Caches that do not grow by this call's keys and values at the end."""

from __future__ import annotations

import torch
from corpus.case import case, eager, grow, step
from models.attention import DIM, KV_HEADS, attend, hidden, past
from models.plain import rotary

UPDATE = "UNSUPPORTED_UPDATE"


def updated(outcome, args=step, attention=attend):
    """Register a function of (cache, k, v) that gives the cached and attended keys and values."""

    def register(update):
        def forward(self, x, cache):
            q, k, v = self.project(x)
            k, v = update(cache, k, v)
            return self.finish(attention(q, k, v)), (k, v)

        forward.__name__, forward.__doc__ = update.__name__, update.__doc__
        return case(outcome, args)(forward)

    return register


@updated("NEW_FIRST", attention=eager)
def newest_first(cache, k, v):
    """Columns count backwards."""
    return torch.cat([k, cache[0]], 2), torch.cat([v, cache[1]], 2)


@updated("NEW_FIRST")
def keys_last_values_first(cache, k, v):
    """Keys and values of one token lie at different columns."""
    return torch.cat([cache[0], k], 2), torch.cat([v, cache[1]], 2)


@updated("PAST_NOT_INPUT")
def old_keys_rotated_further(cache, k, v):
    """The past is rotated anew at every step."""
    return torch.cat([rotary(cache[0], 1), k], 2), torch.cat([cache[1], v], 2)


@updated("PAST_NOT_INPUT")
def beams_reordered_inside(cache, k, v):
    """Rows of the past change places."""
    order = torch.tensor([1, 0])
    return grow([t.index_select(0, order) for t in cache], k, v)


@updated("PAST_NOT_INPUT")
def past_in_other_units(cache, k, v):
    """The past is dequantised by hand."""
    return grow([t / 2 for t in cache], k, v)


@updated("PAST_NOT_INPUT")
def oldest_token_replaced(cache, k, v):
    """A window made by a cat: the oldest token is gone, in every policy."""
    return grow([t[:, :, 1:] for t in cache], k, v)


@updated("PAST_NOT_INPUT")
def attention_sinks_and_a_window(cache, k, v):
    """StreamingLLM by hand."""
    return grow([torch.cat([t[:, :, :1], t[:, :, 3:]], 2) for t in cache], k, v)


@updated(UPDATE)
def put_in_the_middle(cache, k, v):
    """New tokens enter before the last two."""
    return tuple(torch.cat([t[:, :, :-2], n, t[:, :, -2:]], 2) for t, n in zip(cache, (k, v), strict=True))


@updated(UPDATE)
def separator_token_cached_too(cache, k, v):
    """Every call adds a column of zeros, which is no new token."""
    return tuple(torch.cat([t, n, torch.zeros_like(n)], 2) for t, n in zip(cache, (k, v), strict=True))


@updated("CAT_AXIS", lambda: (hidden(5), past()))
def more_heads_at_every_call(cache, k, v):
    """Keys and values grow along the head axis."""
    return torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)


@updated("CAT_AXIS", lambda: (hidden(5), past()), lambda q, k, v: attend(torch.cat([q, q], -1), k, v)[..., :DIM])
def more_features_at_every_call(cache, k, v):
    """Keys grow along the feature axis."""
    return torch.cat([cache[0], k], 3), torch.cat([cache[1], v], 3)


@updated("KEY_VALUE_MISMATCH", lambda: (hidden(), (past()[0], past(4)[1])))
def two_new_values_for_one_new_key(cache, k, v):
    """Keys and values have different lengths of past."""
    return torch.cat([cache[0], k], 2), torch.cat([cache[1], v.repeat(1, 1, 2, 1)], 2)


@updated("KEY_VALUE_MISMATCH")
def keys_cached_values_from_a_sum(cache, k, v):
    """The values are no tokens."""
    k = torch.cat([cache[0], k], 2)
    return k, v.expand(-1, -1, k.shape[2], -1) * cache[1].mean(2, keepdim=True)


@case("KEY_VALUE_MISMATCH")
def one_cache_as_keys_and_values(self, x, cache):
    """q k^T k, written out."""
    q, k, _ = self.project(x)
    k = torch.cat([cache[0], k], 2)
    return self.finish(eager(q, k, k)), k


@case("KEY_ESCAPES")
def one_past_for_keys_and_values(self, x, cache):
    """Two cats grow one input."""
    q, k, v = self.project(x)
    k, v = torch.cat([cache[0], k], 2), torch.cat([cache[0], v], 2)
    return self.finish(attend(q, k, v)), (k, v)


@case(MATCHED, lambda: (hidden(), torch.randn(2, KV_HEADS, 5, 2 * DIM)))
def keys_and_values_packed(self, x, cache):
    """One cat for both; the attention reads halves of it."""
    q, k, v = self.project(x)
    both = torch.cat([cache, torch.cat([k, v], -1)], 2)
    return self.finish(attend(q, *both.chunk(2, -1))), both


@case(MATCHED, lambda: (hidden(), torch.randn(2, 2, KV_HEADS, 5, DIM)))
def keys_and_values_stacked(self, x, cache):
    """One 5-d cat for both."""
    q, k, v = self.project(x)
    both = torch.cat([cache, torch.stack([k, v])], 3)
    return self.finish(attend(q, both[0], both[1])), both


@case(MATCHED, lambda: (hidden(), (torch.randn(2, 5, DIM), torch.randn(2, 5, DIM))))
def one_head_without_an_axis(self, x, cache):
    """Multi-query attention in three dimensions."""
    q, k, v = self.project(x)
    k, v = torch.cat([cache[0], k[:, 0]], 1), torch.cat([cache[1], v[:, 0]], 1)
    return self.finish((q @ k.transpose(1, 2)[:, None] / 3).softmax(-1) @ v[:, None]), (k, v)


@case("UNSUPPORTED_ATTENTION", lambda: (torch.randn(3, 32), (torch.randn(5, 4, 8), torch.randn(5, 4, 8))))
def packed_without_a_batch(self, x, cache):
    """Sequences packed in one: [tokens, heads, features]."""
    q = self.q(x).view(-1, 4, 8)
    k, v = (f(x).view(-1, 2, 8).repeat_interleave(2, 1) for f in (self.k, self.v))
    k, v = torch.cat([cache[0], k]), torch.cat([cache[1], v])
    weights = torch.einsum("qhd,khd->hqk", q, k).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v), (k, v)


@case("DTYPE", lambda: (hidden().double(), tuple(t.double() for t in past())))
def double_precision(self, x, cache):
    """The ops compute in float32."""
    q, k, v = (t.double() for t in self.project(x.float()))
    k, v = grow(cache, k, v)
    return eager(q, k, v), (k, v)


@case("DTYPE", lambda: (hidden(), (past()[0].bfloat16(), past()[1])))
def keys_and_values_of_two_dtypes(self, x, cache):
    """Keys in bfloat16, values in float32."""
    q, k, v = self.project(x)
    k, v = grow(cache, k.bfloat16(), v)
    return self.finish(eager(q, k.float(), v)), (k, v)


@case(UPDATE, lambda: (hidden(), tuple(t.to(torch.float8_e4m3fn) for t in past())))
def eight_bit_floats(self, x, cache):
    """Stored in fewer bits than attended."""
    q, k, v = self.project(x)
    k, v = grow([t.float() for t in cache], k, v)
    return self.finish(attend(q, k, v)), tuple(t.to(torch.float8_e4m3fn) for t in (k, v))


@case(UPDATE)
def stored_without_the_newest(self, x, cache):
    """The last token is attended to and forgotten."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    return self.finish(eager(q, k, v)), (k[:, :, :-1], v[:, :, :-1])


@case("PAST_NOT_INPUT UNSUPPORTED_UPDATE")
def two_tokens_in_one_graph(self, x, cache):
    """Two steps unrolled: the second grows what the first has made."""
    q, k, v = self.project(x)
    cache = grow(cache, k, v)
    q, k, v = self.project(self.finish(attend(q, *cache)))
    cache = grow(cache, k, v)
    return self.finish(attend(q, *cache)), cache


@case("NO_ATTENTION")
def stored_after_the_attention(self, x, cache):
    """The new token does not see itself: the attention reads the past alone."""
    q, k, v = self.project(x)
    return self.finish(attend(q, *cache)), grow(cache, k, v)
