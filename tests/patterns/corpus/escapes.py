"""A cache that grows as it should, and that something else reads or changes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from corpus.case import MATCHED, case, eager, grow, logits, wide
from models.attention import DIM, KV_HEADS, attend
from models.plain import rotary
from torch import nn

K, V = "KEY_ESCAPES", "VALUE_ESCAPES"


def changed(outcome, parts=dict, attention=attend):
    """Register a function of (self, k, v) that says what the attention reads instead of the cached k and v."""

    def register(change):
        def forward(self, x, cache):
            q, k, v = self.project(x)
            k, v = grow(cache, k, v)
            return self.finish(attention(q, *change(self, k, v))), (k, v)

        forward.__name__, forward.__doc__ = change.__name__, change.__doc__
        return case(outcome, parts=parts)(forward)

    return register


@changed(K)
def rolled_keys(self, k, v):
    """Keys meet the values of other tokens."""
    return k.roll(1, 2), v


@changed(K)
def reversed_keys(self, k, v):
    """Masks would be looked up at the wrong end."""
    return k.flip(2), v.flip(2)


@changed(K)
def rotated_after_the_cache(self, k, v):
    """RoPE over all positions at each call: a slot does not know its place any more."""
    return rotary(k, 0), v


@changed(K, attention=eager)
def rotated_after_the_cache_by_hand(self, k, v):
    """The same in front of a product."""
    return rotary(k, 0), v


@changed(K)
def normalised_after_the_cache(self, k, v):
    """Cosine attention whose keys are cached as they come."""
    return F.normalize(k, dim=-1), v


@changed(K)
def mean_taken_off(self, k, v):
    """Centred over all tokens: every key depends on every other."""
    return k - k.mean(2, keepdim=True), v


@changed(K, lambda: {"where": nn.Parameter(torch.randn(1, 1, 64, DIM))})
def places_added_after_the_cache(self, k, v):
    """Learned positions, by column."""
    return k + self.where[:, :, : k.shape[2]], v


@changed(K, lambda: {"scales": nn.Parameter(torch.rand(KV_HEADS, 1, 1))})
def scaled_by_a_weight(self, k, v):
    """A weight of each head on cached keys."""
    return k * self.scales, v


@changed(K)
def smoothed_keys(self, k, v):
    """A convolution over the tokens of the cache."""
    return F.avg_pool1d(k.flatten(0, 1).transpose(1, 2), 3, 1, 1).transpose(1, 2).view_as(k), v


@changed(K)
def padding_zeroed(self, k, v):
    """Keys are masked by their content."""
    return k.where(k.norm(dim=-1, keepdim=True) > 1, 0.0), v


@changed(V)
def padding_zeroed_in_the_values(self, k, v):
    """Values are masked by their content."""
    return k, v.where(v.norm(dim=-1, keepdim=True) > 1, 0.0)


@changed("PROJECTED_CACHE")
def projected_values(self, k, v):
    """Values go through a weight after the cache."""
    return k, v @ self.q.weight[:DIM, :DIM]


@changed(V)
def values_of_one_token_earlier(self, k, v):
    """Shifted against the keys."""
    return k, F.pad(v, (0, 0, 1, 0))[:, :, :-1]


@changed(V)
def running_sum_of_values(self, k, v):
    """Each value contains all older ones."""
    return k, v.cumsum(2)


@changed("UNSUPPORTED_ATTENTION")
def values_times_zero(self, k, v):
    """An ablation: zero is a factor too."""
    return k, v * 0.0


@changed("KEY_ESCAPES")
def rounded_to_eight_bits(self, k, v):
    """The attention reads keys of fewer bits than the cache holds."""
    return k.to(torch.float8_e4m3fn).to(torch.float32), v.to(torch.float8_e4m3fn).to(torch.float32)


@changed("KEY_ESCAPES")
def bits_read_as_another_dtype(self, k, v):
    """A view that keeps the bits and changes the numbers."""
    return tuple(t.to(torch.float16).view(torch.bfloat16).to(torch.float32) for t in (k, v))


@changed(K)
def sorted_keys(self, k, v):
    """Columns in the order of the keys' norms."""
    order = k.norm(dim=-1).argsort(-1)[..., None].expand_as(k)
    return k.gather(2, order), v.gather(2, order)


@changed("UNSUPPORTED_ATTENTION")
def every_second_key(self, k, v):
    """Strided attention: what is evicted would not match the stride."""
    return k[:, :, ::2], v[:, :, ::2]


@changed("GROUP_ORDER", attention=lambda q, k, v: logits(q, k).softmax(-1) @ v)
def tiled_keys(self, k, v):
    """Query head h reads the keys of head h % 2, the values of head h // 2."""
    return k.repeat(1, 2, 1, 1), v.repeat_interleave(2, 1)


@changed(MATCHED, attention=lambda q, k, v: logits(q, k).softmax(-1) @ v)
def tiled_heads(self, k, v):
    """Query head h reads KV head h % 2."""
    return k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)


@changed("LAYOUT")
def heads_and_tokens_confused(self, k, v):
    """A view that mixes tokens of two heads."""
    return k.reshape(2, -1, KV_HEADS, DIM).transpose(1, 2), v.reshape(2, -1, KV_HEADS, DIM).transpose(1, 2)


@changed("LAYOUT")
def all_rows_in_one_sequence(self, k, v):
    """Every row attends over the tokens of all rows."""
    return tuple(t.transpose(0, 1).reshape(1, KV_HEADS, -1, DIM).expand(2, -1, -1, -1) for t in (k, v))


@case(K)
def mask_from_the_cached_keys(self, x, cache):
    """Keys of small norm are hidden: needs all keys at every step."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    loud = (k.norm(dim=-1) > 2).repeat_interleave(2, 1)[:, :, None]
    return self.finish(attend(q, k, v, attn_mask=loud)), (k, v)


@case(V)
def bias_from_the_cached_values(self, x, cache):
    """Norms of values are added to the logits."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    wide_k, wide_v = wide(k, v)
    return self.finish((logits(q, wide_k) + wide_v.norm(dim=-1)[:, :, None]).softmax(-1) @ wide_v), (k, v)


@case(K)
def position_to_content(self, x, cache):
    """DeBERTa: the cached keys also meet embeddings of positions."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    wide_k, wide_v = wide(k, v)
    bias = (wide_k @ self.q.weight[:DIM, :1]).transpose(-1, -2)
    return self.finish((logits(q, wide_k) + bias).softmax(-1) @ wide_v), (k, v)


@case(K)
def queries_look_first(self, x, cache):
    """The queries depend on the mean key of the past."""
    q, k, v = self.project(x)
    q = q + cache[0].mean(2, keepdim=True).repeat_interleave(2, 1)
    k, v = grow(cache, k, v)
    return self.finish(attend(q, k, v)), (k, v)


@case(V)
def new_values_depend_on_old_ones(self, x, cache):
    """A recurrence over the value cache."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v + 0.5 * cache[1][:, :, -1:])
    return self.finish(attend(q, k, v)), (k, v)


@case(K)
def linear_term_beside_the_softmax(self, x, cache):
    """Softmax attention plus q (k^T v) over the same cache."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    wide_k, wide_v = wide(k, v)
    return self.finish(attend(q, k, v) + q @ (wide_k.transpose(-1, -2) @ wide_v)), (k, v)


@case("UNSUPPORTED_ATTENTION")
def values_read_twice(self, x, cache):
    """Probabilities meet the values, and the keys."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    wide_k, wide_v = wide(k, v)
    weights = logits(q, wide_k).softmax(-1)
    return self.finish(weights @ wide_v + weights @ wide_k), (k, v)
