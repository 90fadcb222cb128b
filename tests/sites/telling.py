"""Layers that are declined, each with the change that its hint asks for: `forward(self, right, x, ...)`, where `right`
follows the hint and nothing else differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from models.attention import DIM, KV_HEADS, WIDTH, attend, hidden, past
from torch import nn
from torch.nn.attention.flex_attention import flex_attention


@dataclass(frozen=True)
class Told:
    """`line`: of the user's code, at which the message points. `hint`: a part of what it says. `args`: of a call."""

    reason: str
    line: str
    hint: str
    forward: Callable[..., Any]
    args: Callable[[bool], tuple[Any, ...]]


CASES: dict[str, Told] = {}


def step(right: bool) -> tuple[Any, ...]:
    return hidden(), past()


def told(reason: str, line: str, hint: str, args: Callable[[bool], tuple[Any, ...]] = step) -> Any:
    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        CASES[forward.__name__] = Told(reason, line, hint, forward, args)
        return forward

    return register


def grow(cache: Any, k: Any, v: Any) -> tuple[Any, Any]:
    return torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)


def softmaxed(q: Any, k: Any, v: Any, change: Any = lambda t: t) -> Any:
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    return torch.softmax(change(q @ k.mT / DIM**0.5), -1) @ v


@told("UNSUPPORTED_ATTENTION", "torch.softmax(change(q @ k.mT", "softmax(q k^T * scale + mask)")
def a_sine_of_the_logits(self, right, x, cache):
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    y = softmaxed(q, k, v) if right else softmaxed(q, k, v, lambda t: torch.sin(t))
    return self.finish(y), k, v


@told("UNSUPPORTED_ATTENTION", "q @ spread_k.mT / DIM**0.5 + shift", "softmax(q k^T * scale + mask)")
def a_shift_that_sinks_do_not_have(self, right, x, cache):
    """0-d tensors and numbers shift all logits alike, which softmax does not see, but for what is beside them."""
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    spread_k, spread_v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    shift = torch.tensor(0.5)
    logits = q @ spread_k.mT / DIM**0.5 + shift
    sinks = torch.arange(4.0).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    both = torch.softmax(torch.cat([logits, sinks], -1), -1)[..., :-1] if not right else torch.softmax(logits, -1)
    return self.finish(both @ spread_v), k, v


@told("UNSUPPORTED_ATTENTION", "k[:, :, -3:]", "let it read all that is cached")
def a_part_is_attended_to(self, right, x, cache):
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    y = attend(q, k, v) if right else attend(q, k[:, :, -3:], v[:, :, -3:])
    return self.finish(y), k, v


@told("UNSUPPORTED_UPDATE", "k.transpose(1, 2)", "return what torch.cat gives")
def stored_transposed(self, right, x, cache):
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    y = self.finish(attend(q, k, v))
    return (y, k, v) if right else (y, k.transpose(1, 2), v.transpose(1, 2))


@told("UNSUPPORTED_UPDATE", "keys = cache[0] * 0.9 + k", "buf[:, :, pos] = k")
def a_buffer_that_decays(self, right, x, cache):
    q, k, v = self.project(x)
    keys, values = cache
    if right:
        keys[:, :, 2:3], values[:, :, 2:3] = k, v
    else:
        keys = cache[0] * 0.9 + k
        values = cache[1] * 0.9 + v
    return self.finish(attend(q, keys, values, attn_mask=torch.arange(5)[None] <= 2)), keys, values


@told("UNSUPPORTED_UPDATE", "cache[0].add_(k)", "with one index along the token axis")
def a_buffer_that_is_added_to(self, right, x, cache):
    q, k, v = self.project(x)
    if right:
        cache[0][:, :, 2:3], cache[1][:, :, 2:3] = k, v
    else:
        cache[0].add_(k)
        cache[1].add_(v)
    return self.finish(attend(q, *cache, attn_mask=torch.arange(5)[None] <= 2))


@told("UNSUPPORTED_UPDATE", "keys[:, :, :3] = k", "return the buffer", lambda right: (hidden(3),))
def a_buffer_that_is_forgotten(self, right, x):
    q, k, v = self.project(x)
    keys, values = torch.zeros(2, 2, 9, 8), torch.zeros(2, 2, 9, 8)
    keys[:, :, :3] = k
    values[:, :, :3] = v
    y = self.finish(attend(q, keys, values, is_causal=True))
    return (y, keys, values) if right else y


@told("NO_ATTENTION", "torch.cat([cache[", "graph break")
def updated_and_read_by_another_graph(self, right, x, cache):
    q, k, v = self.project(x)
    k = torch.cat([cache[0], k], 2)
    v = torch.cat([cache[1], v], 2)
    if not right:
        torch._dynamo.graph_break()
    return self.finish(attend(q, k, v)), k, v


@told("KEY_ESCAPES", "k.amax", "only the attention")
def keys_that_others_read(self, right, x, cache):
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    y = self.finish(attend(q, k, v))
    return (y, k, v) if right else (y, k, v, k.amax(2))


@told("KEY_ESCAPES", "k * x.new_ones(8).cos()", "as the attention reads them")
def keys_turned_when_read(self, right, x, cache):
    q, k, v = self.project(x)
    if right:
        k = k * x.new_ones(8).cos()
    k, v = grow(cache, k, v)
    return self.finish(attend(q, k if right else k * x.new_ones(8).cos(), v)), k, v


@told("KEY_ESCAPES", "k * x.new_ones(8).cos()", "as the attention reads them", lambda right: (hidden(6),))
def keys_turned_after_they_are_returned(self, right, x):
    q, k, v = self.project(x)
    turned = k * x.new_ones(8).cos()
    return self.finish(attend(q, turned, v)), turned if right else k, v


@told("VALUE_ESCAPES", "v.amax", "only the attention")
def values_that_others_read(self, right, x, cache):
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    y = self.finish(attend(q, k, v))
    return (y, k, v) if right else (y, k, v, v.amax(2))


@told("GROUP_ORDER", "k.repeat(1, 2, 1, 1)", "in the same order")
def only_keys_are_tiled(self, right, x, cache):
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    wide = k.repeat_interleave(2, 1) if right else k.repeat(1, 2, 1, 1)
    return self.finish(attend(q, wide, v.repeat_interleave(2, 1))), k, v


@told("CAT_AXIS", "torch.cat([cache[0], k], 1)", "along its token axis", lambda right: (hidden(), past(1)))
def heads_that_grow(self, right, x, cache):
    q, k, v = self.project(x)
    if right:
        k, v = grow(cache, k, v)
    else:
        k = torch.cat([cache[0], k], 1)
        v = torch.cat([cache[1], v], 1)
    return self.finish(attend(q, k, v)), k, v


@told("NEW_FIRST", "torch.cat([k, cache[0]], 2)", "the past must come first")
def newest_first(self, right, x, cache):
    q, k, v = self.project(x)
    if right:
        k, v = grow(cache, k, v)
    else:
        k = torch.cat([k, cache[0]], 2)
        v = torch.cat([v, cache[1]], 2)
    return self.finish(attend(q, k, v)), k, v


@told("PAST_NOT_INPUT", "torch.cat([cache[0] * 0.9, k], 2)", "an input of the graph itself")
def a_past_that_decays(self, right, x, cache):
    q, k, v = self.project(x)
    if right:
        k, v = grow(cache, k, v)
    else:
        k = torch.cat([cache[0] * 0.9, k], 2)
        v = torch.cat([cache[1] * 0.9, v], 2)
    return self.finish(attend(q, k, v)), k, v


@told("DROPOUT", "dropout_p=0.0 if right else 0.1", "let dropout be 0.0")
def dropout(self, right, x, cache):
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, dropout_p=0.0 if right else 0.1)
    return self.finish(y), k, v


@told("MASK_UNKNOWN", "masked_fill(hidden, -1000.0 if not right else -torch.inf)", "or -inf")
def a_small_number_hides(self, right, x, cache):
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    hidden = torch.arange(6)[None] < 1
    y = softmaxed(q, k, v, lambda t: t.masked_fill(hidden, -1000.0 if not right else -torch.inf))
    return self.finish(y), k, v


@told("CAUSAL_WITH_PAST", "is_causal=not right", "pass no mask")
def causal_with_one_query(self, right, x, cache):
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=not right)
    return self.finish(y), k, v


@told("QUERY_COUNT", "attention(q if right", "one query for each", lambda right: (hidden(6),))
def only_the_last_asks(self, right, x):
    q, k, v = self.project(x)
    y = F.scaled_dot_product_attention(q if right else q[:, :, -1:], k, v, enable_gqa=True)
    return self.finish(y)[:, -1:], k, v


@told("PACKED_CACHE", "both[..., ::2], both[..., 1::2]", "as two tensors", lambda right: (hidden(6),))
def entries_of_keys_and_values_alternate(self, right, x):
    q, k, v = self.project(x)
    if right:
        return self.finish(attend(q, k, v)), k, v
    both = torch.stack([k, v], -1).flatten(3)
    k, v = both[..., ::2], both[..., 1::2]
    return self.finish(attend(q, k, v)), both


def _latents(right: bool) -> tuple[Any, ...]:
    return (hidden(1), *past()) if right else (hidden(1), torch.randn(2, 5, DIM))


@told("PROJECTED_CACHE", "keys = self.up_k(latent)", "project first, then cache", _latents)
def latents(self, right, x, *cache):
    q, latent = self.project(x)[0], self.down(x)
    if not right:
        latent = torch.cat([cache[0], latent], 1)
    keys = self.up_k(latent)
    values = self.up_v(latent)
    k, v = (t.unflatten(2, (KV_HEADS, DIM)).transpose(1, 2) for t in (keys, values))
    if right:
        k, v = grow(cache, k, v)
    return self.finish(attend(q, k, v)), *((k, v) if right else (latent,))


@told("PROJECTED_CACHE", "keys = self.up_k(latent)", "project first, then cache", lambda right: (hidden(6),))
def latents_of_a_prompt(self, right, x):
    q, latent = self.project(x)[0], self.down(x)
    keys = self.up_k(latent)
    values = self.up_v(latent)
    k, v = (t.unflatten(2, (KV_HEADS, DIM)).transpose(1, 2) for t in (keys, values))
    return self.finish(attend(q, k, v)), *((k, v) if right else (latent,))


def _pool(right: bool) -> tuple[Any, ...]:
    rows = past(batch=1) if right else (torch.randn(20, KV_HEADS, DIM), torch.randn(20, KV_HEADS, DIM))
    return hidden(1, 1), *rows, torch.tensor([5]), torch.arange(6)


@told("PAGED_CACHE", "keys = pool_k.index_select(0, read)", "a cache of its own", _pool)
def a_pool_of_rows(self, right, x, pool_k, pool_v, write, read):
    q, k, v = self.project(x)
    if right:
        k, v = grow((pool_k, pool_v), k, v)
        return self.finish(attend(q, k, v)), k, v
    pool_k.index_copy_(0, write, k[0].transpose(0, 1))
    pool_v.index_copy_(0, write, v[0].transpose(0, 1))
    keys = pool_k.index_select(0, read)
    values = pool_v.index_select(0, read)
    return self.finish(attend(q, keys.transpose(0, 1)[None], values.transpose(0, 1)[None]))


@told("FLEX_ATTENTION", "flex_attention(q, k, v, enable_gqa=True)", "F.scaled_dot_product_attention")
def flex(self, right, x, cache):
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    return self.finish(attend(q, k, v) if right else flex_attention(q, k, v, enable_gqa=True)), k, v


@told("SHARED_CACHE", "k = torch.cat([cache[0], k], 2)", "the same queries, keys, scale and mask")
def two_attentions(self, right, x, cache):
    q, k, v = self.project(x)
    k = torch.cat([cache[0], k], 2)
    v = torch.cat([cache[1], v], 2)
    y = attend(q, k, v)
    return self.finish(y if right else y + attend(q.flip(1), k, v)), k, v


@told("KEY_VALUE_MISMATCH", "v = self.v(x)", "cached in the same way")
def only_keys_are_cached(self, right, x, cache):
    q, k, _ = self.project(x)
    k = torch.cat([cache[0], k], 2)
    v = self.v(x)
    v = v.unflatten(2, (KV_HEADS, DIM)).transpose(1, 2)
    v = torch.cat([cache[1], v], 2) if right else v.expand(-1, -1, k.shape[2], -1)
    return self.finish(attend(q, k, v)), k, *((v,) if right else ())


def _double(right: bool) -> tuple[Any, ...]:
    return (hidden(), past()) if right else (hidden().double(), tuple(t.double() for t in past()))


@told("DTYPE", "F.scaled_dot_product_attention(q, k, v, enable_gqa=True)", "float32, bfloat16 or float16", _double)
def double(self, right, x, cache):
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    return self.finish(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)), k, v


def _flat(right: bool) -> tuple[Any, ...]:
    return hidden(), past() if right else tuple(t.transpose(1, 2).flatten(1, 2) for t in past())


@told("LAYOUT", "keys, values = (t.unflatten(1", "keep tokens and sequences apart", _flat)
def tokens_and_heads_in_one_axis(self, right, x, cache):
    q, k, v = self.project(x)
    if right:
        k, v = grow(cache, k, v)
        return self.finish(attend(q, k, v)), k, v
    k, v = (t.transpose(1, 2).flatten(1, 2) for t in (k, v))
    k = torch.cat([cache[0], k], 1)
    v = torch.cat([cache[1], v], 1)
    keys, values = (t.unflatten(1, (-1, KV_HEADS)).transpose(1, 2) for t in (k, v))
    return self.finish(attend(q, keys, values)), k, v


PARTS: dict[str, Any] = {
    "down": nn.Linear(WIDTH, DIM),
    "up_k": nn.Linear(DIM, KV_HEADS * DIM),
    "up_v": nn.Linear(DIM, KV_HEADS * DIM),
}


@told("MASK_SHAPE", "lambda t: t + mask", "add a mask of floats")
def a_mask_of_integers(self, right, x, cache):
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    mask = -1_000_000 * (torch.arange(k.shape[2]) == 1)
    mask = mask.to(q.dtype) if right else mask
    return self.finish(softmaxed(q, k, v, lambda t: t + mask)), k, v


@told("AUTOCAST", "F.scaled_dot_product_attention(q, k, v", "outside of torch.autocast")
def under_autocast(self, right, x, cache):
    q, k, v = self.project(x)
    k, v = grow(cache, k, v)
    with torch.autocast("cpu", torch.bfloat16, enabled=not right):
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return self.finish(y.to(x.dtype)), k, v
