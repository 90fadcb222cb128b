"""Caches that kvpass knows and does not rewrite: each is named, stays dense, and gives the model's own numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.attention import attend, hidden, layer, lenient, past
from models.graphs import table

import kvpass


def window(self, x, cache, size=4):
    """HF's sliding layer: attends over all, keeps the last `size - 1`."""
    q, k, v = self.project(x)
    k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
    return self.finish(attend(q, k, v)), (k[:, :, -size + 1 :], v[:, :, -size + 1 :])


def window_read(self, x, cache, size=4):
    """Attends over what it keeps. With as many new tokens as fit in the window, it looks like a first call."""
    q, k, v = self.project(x)
    k, v = (torch.cat([old, new], 2)[:, :, -size:] for old, new in zip(cache, (k, v), strict=True))
    return self.finish(attend(q, k, v)), (k, v)


def shifted(self, x, cache):
    q, k, v = self.project(x)
    length = x.shape[1]
    k, v = torch.cat([cache[0][:, :, length:], k], 2), torch.cat([cache[1][:, :, length:], v], 2)
    return self.finish(attend(q, k, v)), (k, v)


def returned_transposed(self, x, cache):
    q, k, v = self.project(x)
    k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
    return self.finish(attend(q, k, v)), (k.transpose(1, 2), v.transpose(1, 2))


def quantised(self, x, cache):
    q, k, v = self.project(x)
    k, v = torch.cat([cache[0].float() / 16, k], 2), torch.cat([cache[1].float() / 16, v], 2)
    return self.finish(attend(q, k, v)), tuple((t * 16).to(torch.int8) for t in (k, v))


def part_attended(self, x, cache):
    q, k, v = self.project(x)
    k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
    return self.finish(attend(q, k[:, :, -3:], v[:, :, -3:])), (k, v)


def index_copy(self, x, cache):
    q, k, v = self.project(x)
    at = torch.arange(x.shape[1])
    cache[0].index_copy_(2, at, k)
    cache[1].index_copy_(2, at, v)
    return self.finish(attend(q, cache[0], cache[1]))


def index_copy_result(self, x, cache):
    q, k, v = self.project(x)
    at = torch.arange(x.shape[1])
    return self.finish(attend(q, cache[0].index_copy_(2, at, k), cache[1].index_copy_(2, at, v)))


def functional_index_copy(self, x, cache):
    q, k, v = self.project(x)
    at = torch.arange(x.shape[1])
    k, v = cache[0].index_copy(2, at, k), cache[1].index_copy(2, at, v)
    return self.finish(attend(q, k, v)), (k, v)


def setitem(self, x, cache):
    q, k, v = self.project(x)
    cache[0][:, :, : x.shape[1]] = k
    cache[1][:, :, : x.shape[1]] = v
    return self.finish(attend(q, *cache))


def copy_into_a_slice(self, x, cache):
    q, k, v = self.project(x)
    cache[0].narrow(2, 1, x.shape[1]).copy_(k)
    cache[1].narrow(2, 1, x.shape[1]).copy_(v)
    return self.finish(attend(q, *cache))


def slice_scatter(self, x, cache):
    q, k, v = self.project(x)
    k = torch.slice_scatter(cache[0], k, 2, 0, x.shape[1])
    v = torch.slice_scatter(cache[1], v, 2, 0, x.shape[1])
    return self.finish(attend(q, k, v)), (k, v)


def static_first_call(self, x, cache):
    """Allocated in the graph, as HF's StaticCache does."""
    q, k, v = self.project(x)
    keys, values = torch.zeros(2, 2, 9, 8), torch.zeros(2, 2, 9, 8)
    keys[:, :, : x.shape[1]] = k
    values[:, :, : x.shape[1]] = v
    return self.finish(attend(q, keys, values)), (keys, values)


def gated_attention(self, x, cache):
    q, k, v = self.project(x)
    k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
    wide_k, wide_v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    weights = (q @ wide_k.transpose(2, 3) / 8).softmax(-1)
    return self.finish((weights * q.mean(-1, keepdim=True).sigmoid()) @ wide_v), (k, v)


def baddbmm_attention(self, x, cache):
    """Bloom: batch and heads in one axis, keys cached transposed."""
    q, k, v = (t.repeat_interleave(4 // t.shape[1], 1).flatten(0, 1) for t in self.project(x))
    k, v = torch.cat([cache[0].transpose(1, 2), k.transpose(1, 2)], 2), torch.cat([cache[1], v], 1)
    weights = torch.baddbmm(torch.zeros(1), q, k).softmax(-1)
    return self.finish((weights @ v).unflatten(0, (2, 4))), (k, v)


def keys_changed(self, x, cache):
    q, k, v = self.project(x)
    k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
    return self.finish(attend(q, k * k.new_ones(8), v)), (k, v)


def latent(self, x, cache):
    """MLA: what is cached is projected again."""
    q, _, _ = self.project(x)
    both = torch.cat([cache[0], x], 1)
    _, k, v = self.project(both)
    return self.finish(attend(q, k, v)), both


CASES: dict[str, tuple[Any, tuple[Any, ...], str, str, str]] = {
    "sliding window": (window, (hidden(), past()), "SLIDING_WINDOW", "only the end", "[:, :, -size + 1 :]"),
    "window, new tokens fill it": (
        window_read,
        (hidden(4), past()),
        "SLIDING_WINDOW",
        "only the end",
        "torch.cat",
    ),
    "window, from nothing": (window_read, (hidden(4), past(0)), "SLIDING_WINDOW", "only the end", "torch.cat"),
    "shifted": (shifted, (hidden(), past()), "PAST_NOT_INPUT", "is computed", "torch.cat"),
    "returned transposed": (returned_transposed, (hidden(), past()), "UNSUPPORTED_UPDATE", "transpose", "(1, 2)"),
    "quantised": (
        quantised,
        (hidden(), tuple((t * 16).char() for t in past())),
        "UNSUPPORTED_UPDATE",
        "to of it",
        "16",
    ),
    "part attended": (part_attended, (hidden(), past()), "UNSUPPORTED_ATTENTION", "only a part", "-3:"),
    "index_copy_": (index_copy, (hidden(), past()), "MASK_UNKNOWN", "whole buffer", "scaled_dot_product"),
    "result of index_copy_": (
        index_copy_result,
        (hidden(), past()),
        "MASK_UNKNOWN",
        "whole buffer",
        "scaled_dot_product",
    ),
    "index_copy": (functional_index_copy, (hidden(5), past()), "MASK_UNKNOWN", "whole buffer", "scaled_dot_product"),
    "setitem": (setitem, (hidden(3), past()), "MASK_UNKNOWN", "whole buffer", "scaled_dot_product"),
    "copy_": (copy_into_a_slice, (hidden(), past()), "MASK_UNKNOWN", "whole buffer", "scaled_dot_product"),
    "slice_scatter": (slice_scatter, (hidden(3), past()), "MASK_UNKNOWN", "whole buffer", "scaled_dot_product"),
    "static": (static_first_call, (hidden(5), past()), "MASK_UNKNOWN", "whole buffer", "scaled_dot_product"),
    "gated": (gated_attention, (hidden(), past()), "UNSUPPORTED_ATTENTION", "go through mul", "sigmoid"),
    "keys changed": (keys_changed, (hidden(), past()), "KEY_ESCAPES", "mul changes", "k * k.new_ones(8)"),
    "latent": (latent, (hidden(), (hidden(5),)), "PROJECTED_CACHE", "anew in each call", ""),
}


def fresh(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies, as some of the layers write into their caches."""
    x, cache = args
    return x.clone(), tuple(t.clone() for t in cache)


@pytest.mark.parametrize("name", CASES)
def test_declined_with_reason_node_and_line(name):
    forward, args, reason, what, line = CASES[name]
    found = table(layer(forward), *fresh(args))
    assert not found.sites
    (decline,) = found.declined
    assert decline.reason == reason
    assert what in decline.detail
    assert decline.node
    assert "test_declined.py" in decline.source or reason == "MASK_UNKNOWN" or name == "latent"
    assert line in decline.source


@pytest.mark.parametrize("name", CASES)
def test_lenient_gives_the_models_own_numbers(name):
    forward, args, *_ = CASES[name]
    model = layer(forward)
    with torch.no_grad():
        expected = model(*fresh(args))
        found = lenient(model)(*fresh(args))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_strict_raises(name):
    forward, args, reason, *_ = CASES[name]
    compiled = kvpass.compile(layer(forward), "h2o", 8, inner="eager")
    with torch.no_grad():
        if reason == "SLIDING_WINDOW":  # dense by choice
            torch.testing.assert_close(compiled(*fresh(args)), layer(forward)(*fresh(args)), rtol=0, atol=0)
            return
        with pytest.raises(kvpass.KVPassError, match=reason):
            compiled(*fresh(args))


def test_bloom():
    """The keys are cached transposed, batch and heads in one axis."""
    cache = torch.randn(8, 5, 8), torch.randn(8, 5, 8)
    (decline,) = table(layer(baddbmm_attention), hidden(), cache).declined
    assert decline.reason == "UNSUPPORTED_UPDATE"


def test_a_dense_site_never_reads_a_compressed_cache():
    """The first call can be rewritten, the second cannot: under strict=False that is an error, not NaN."""

    def forward(self, x, cache=None):
        q, k, v = self.project(x)
        if cache is not None:
            k, v = torch.cat([k, cache[0]], 2), torch.cat([v, cache[1]], 2)
        return self.finish(attend(q, k, v)), (k, v)

    compiled = lenient(layer(forward))
    with torch.no_grad():
        _, cache = compiled(hidden(20))
        with pytest.raises(kvpass.KVPassError, match="reads the compressed cache of") as caught:
            compiled(hidden(), cache)
    assert type(caught.value).__name__ == "ShellDataError"
    assert "kvpass.explain" in caught.value.hint
