"""View chains between a cache and its attention: what they do to the axes, by name and by value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models.graphs import dynamic, outcome, table
from torch import Tensor, fx

from kvpass.errors import Reason
from kvpass.graph.miss import Miss
from kvpass.graph.layouts import read_layout
from kvpass.graph.views import is_view, walk_up
from kvpass.terms import Layout

B, H, G, D, PAST = 2, 2, 4, 16, 5


def attend(view: Callable[[Tensor], Tensor], axis: int) -> Callable[..., Any]:
    def call(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
        k, v = torch.cat([past_k, k], axis), torch.cat([past_v, v], axis)
        return F.scaled_dot_product_attention(q, view(k), view(v), enable_gqa=True), k, v

    return call


def tensors(layout: Layout, heads: int = H, new: int = 1, past: int = PAST, batch: int = B) -> list[Tensor]:
    """q, new k and v, past k and v."""

    def cached(length: int) -> Tensor:
        sizes = {"B": batch, "H": heads, "T": length, "D": D}
        return torch.randn([sizes[letter] for letter in layout.value])

    return [torch.randn(batch, H * G, new, D), *(cached(length) for length in (new, new, past, past))]


def repeated(spelling: str, k: Tensor) -> Tensor:
    """repeat_kv in BHTD, as people write it."""
    b, h, t, d = k.shape
    g = H * G // h
    spellings: dict[str, Callable[[], Tensor]] = {
        "none with enable_gqa": lambda: k,
        "getitem expand reshape": lambda: k[:, :, None, :, :].expand(b, h, g, t, d).reshape(b, h * g, t, d),
        "getitem ellipsis": lambda: k[:, :, None, ...].expand(-1, -1, g, -1, -1).reshape(b, -1, t, d),
        "unsqueeze expand flatten": lambda: k.unsqueeze(2).expand(b, h, g, t, d).flatten(1, 2),
        "unsqueeze repeat view": lambda: k.unsqueeze(2).repeat(1, 1, g, 1, 1).view(b, h * g, t, d),
        "broadcast_to": lambda: torch.broadcast_to(k[:, :, None], (b, h, g, t, d)).reshape(b, h * g, t, d),
        "repeat_interleave": lambda: k.repeat_interleave(g, 1),
        "torch.repeat_interleave": lambda: torch.repeat_interleave(k, g, dim=-3),
        "keywords": lambda: torch.repeat_interleave(input=k, repeats=g, dim=1),
        "contiguous": lambda: k.contiguous().repeat_interleave(g, dim=1).contiguous(),
        "there and back": lambda: k.permute(0, 2, 1, 3).transpose(dim0=1, dim1=2).repeat_interleave(g, 1),
        "same dtype": lambda: k.to(torch.float32).repeat_interleave(g, 1),
    }
    return spellings[spelling]()


SPELLINGS = [
    "none with enable_gqa",
    "getitem expand reshape",
    "getitem ellipsis",
    "unsqueeze expand flatten",
    "unsqueeze repeat view",
    "broadcast_to",
    "repeat_interleave",
    "torch.repeat_interleave",
    "keywords",
    "contiguous",
    "there and back",
    "same dtype",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_repeat_kv(spelling: str) -> None:
    found = table(attend(lambda k: repeated(spelling, k), 2), *tensors(Layout.BHTD))
    (site,) = found.sites
    assert (site.key.layout, site.value.layout) == (Layout.BHTD, Layout.BHTD)
    assert (site.dims["Hq"], site.dims["Hkv"], site.group) == (H * G, H, G)


@pytest.mark.parametrize("spelling", ["none with enable_gqa", "getitem expand reshape", "repeat_interleave"])
@pytest.mark.parametrize(
    "swap", [lambda k: k.transpose(1, 2), lambda k: k.permute(0, 2, 1, 3), lambda k: k.swapaxes(2, 1)]
)
def test_tokens_before_heads(spelling: str, swap: Callable[[Tensor], Tensor]) -> None:
    (site,) = table(attend(lambda k: repeated(spelling, swap(k)), 1), *tensors(Layout.BTHD)).sites
    assert site.key.layout is Layout.BTHD
    assert site.dims["Hkv"] == H


def test_heads_repeated_before_they_are_moved() -> None:
    (site,) = table(attend(lambda k: k.repeat_interleave(G, 2).transpose(1, 2), 1), *tensors(Layout.BTHD)).sites
    assert site.key.layout is Layout.BTHD


@pytest.mark.parametrize(
    "view",
    [
        lambda k: k.expand(-1, H * G, -1, -1),
        lambda k: k.repeat(1, H * G, 1, 1),  # with one KV head the tiled order is the interleaved one
        lambda k: k[:, None].expand(-1, H * G, -1, -1, -1).reshape(k.shape[0], H * G, -1, D),
        lambda k: k,
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_one_kv_head(view: Callable[[Tensor], Tensor], batch: int) -> None:
    (site,) = table(attend(view, 2), *tensors(Layout.BHTD, heads=1, batch=batch)).sites
    assert (site.dims["Hkv"], site.group) == (1, H * G)


@pytest.mark.parametrize("spelling", ["getitem expand reshape", "unsqueeze expand flatten", "repeat_interleave"])
def test_dynamic_sizes(spelling: str) -> None:
    q, k, v, past_k, past_v = tensors(Layout.BHTD)
    inputs = [dynamic(t, 0) for t in (q, k, v)] + [dynamic(t, 0, 2) for t in (past_k, past_v)]
    (site,) = table(attend(lambda t: repeated(spelling, t), 2), *inputs).sites
    assert site.key.layout is Layout.BHTD
    assert isinstance(site.dims["B"], torch.SymInt)


@pytest.mark.parametrize(
    "view",
    [
        lambda k: k.repeat(1, G, 1, 1),
        lambda k: torch.tile(k, (1, G, 1, 1)),
        lambda k: k[:, None].expand(B, G, H, -1, D).reshape(B, G * H, -1, D),
    ],
)
def test_tiled_heads(view: Callable[[Tensor], Tensor]) -> None:
    (site,) = table(attend(view, 2), *tensors(Layout.BHTD)).sites
    assert site.core.tiled


REFUSED = {
    "tokens repeated": (lambda k: k.repeat_interleave(2, 2), Reason.LAYOUT),
    "tokens and heads swapped": (lambda k: k.reshape(B, -1, H, D).transpose(1, 2), Reason.LAYOUT),
    "scaled by a vector": (lambda k: k * torch.arange(16.0), Reason.KEY_ESCAPES),
    "sliced": (lambda k: k[:, :, 1:], Reason.UNSUPPORTED_ATTENTION),
    "other bits": (lambda k: k.view(torch.int32).view(torch.float32), Reason.KEY_ESCAPES),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_views(name: str) -> None:
    view, reason = REFUSED[name]
    assert outcome(attend(view, 2), *tensors(Layout.BHTD)) == reason.value


def test_square_sizes_are_told_apart() -> None:
    """T == H == D: only the way of the axes says which is which."""
    batch, square = 2, 4
    q = torch.randn(batch, square, 1, square)
    new, past = torch.randn(batch, 1, square, square), torch.randn(batch, square - 1, square, square)
    (site,) = table(attend(lambda k: k.transpose(1, 2), 1), q, new, new.clone(), past, past.clone()).sites
    assert site.key.layout is Layout.BTHD
    assert outcome(attend(lambda k: k, 1), q, new, new.clone(), past, past.clone()) == "CAT_AXIS"


def chained(base: Tensor, steps: list[tuple[str, tuple[Any, ...]]]) -> tuple[fx.Node, fx.Node]:
    """A graph of method calls with real values in its meta: first and last node."""
    graph = fx.Graph()
    first = node = graph.placeholder("base")
    first.meta["example_value"] = value = base
    for method, args in steps:
        try:
            value = getattr(value, method)(*args)
        except (RuntimeError, IndexError):
            continue
        node = graph.call_method(method, (node, *args))
        node.meta["example_value"] = value
    return first, node


DIM = st.integers(-4, 3)
SIZE = st.sampled_from([1, 2, 3, 4, 6, -1])
STEP = st.one_of(
    st.tuples(st.just("transpose"), st.tuples(DIM, DIM)),
    st.tuples(st.just("permute"), st.permutations(range(4)).map(tuple)),
    st.tuples(st.just("unsqueeze"), st.tuples(st.integers(0, 4))),
    st.tuples(st.just("squeeze"), st.tuples(DIM)),
    st.tuples(st.just("flatten"), st.tuples(st.integers(0, 2), st.integers(1, 3))),
    st.tuples(st.just("reshape"), st.lists(SIZE, min_size=4, max_size=4).map(tuple)),
    st.tuples(st.just("expand"), st.lists(SIZE, min_size=4, max_size=5).map(tuple)),
    st.tuples(st.just("repeat_interleave"), st.tuples(st.integers(1, 3), DIM)),
    st.tuples(st.just("repeat"), st.lists(st.sampled_from([1, 1, 1, 2]), min_size=4, max_size=4).map(tuple)),
)


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=4, max_size=4), st.lists(STEP, max_size=5))
def test_an_accepted_chain_is_what_it_is_taken_for(sizes: list[int], steps: list[Any]) -> None:
    """By value: grouped heads of the base in the layout that was read, whatever sizes coincide."""
    base = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
    first, last = chained(base, steps)
    found, chain = walk_up(last, lambda n: n is first)
    if found is not first:
        return
    try:
        layout = read_layout(first, chain)
    except Miss:
        return
    heads_first = base
    for name, *args in layout.to_heads_first:
        heads_first = getattr(heads_first, name)(*args)
    seen = last.meta["example_value"]
    assert torch.equal(seen, heads_first.repeat_interleave(seen.shape[1] // heads_first.shape[1], 1))


def test_a_slice_is_no_view_of_the_whole() -> None:
    first, last = chained(torch.randn(2, 3, 4, 5), [("transpose", (1, 2)), ("contiguous", ())])
    assert is_view(last)
    assert not is_view(first)
    graph = last.graph
    cut = graph.call_method("narrow", (last, 1, 0, 2))
    cut.meta["example_value"] = last.meta["example_value"].narrow(1, 0, 2)
    assert walk_up(cut, lambda n: False) == (cut, ())
