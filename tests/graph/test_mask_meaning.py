"""Words for masks: of real models, made by hand, and those that nobody can name."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kvpass.patterns import DEFAULT
from models import tiny
from models.attention import HEADS, attend, hidden, layer, past
from models.graphs import capture_all, table
from spelling import with_cache
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM, StaticCache

from kvpass.graph.mask_meaning import mask_kind
from kvpass.graph.symbols import free_size
from kvpass.sites.scan import scan
from kvpass.terms import MaskKind

SMALL = {"vocab_size": 97, "hidden_size": 32, "pad_token_id": 0}


def kinds(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, **more: Any) -> set[str]:
    graphs = capture_all(model, ids, attention_mask=mask, use_cache=True, **more)
    return {site.to_dict()["mask_kind"] for gm in graphs for site in scan(gm, DEFAULT)}


def test_llama() -> None:
    ids, mask = tiny.left_padded([6, 4])
    assert kinds(tiny.llama(), ids, mask) == {"causal + padding"}
    assert kinds(tiny.llama(), ids, None) == {"causal"}


def test_bloom() -> None:
    model = BloomForCausalLM(BloomConfig(**SMALL, n_layer=2, n_head=4)).eval()
    ids, mask = tiny.left_padded([6, 4])
    assert kinds(model, ids, mask) == {"causal + padding + bias"}


@pytest.mark.parametrize("window", [None, 4])
def test_a_window_over_a_static_cache(window: int | None) -> None:
    config = MistralConfig(
        **SMALL,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
    )
    full = MistralConfig.from_dict({**config.to_dict(), "sliding_window": None})
    model, cache = MistralForCausalLM(config).eval(), StaticCache(config=full, max_cache_len=12)
    ids, mask = tiny.left_padded([6, 4])
    expected = "causal + window + padding" if window else "causal + padding"
    assert kinds(model, ids, mask, **with_cache(model, cache)) == {expected}


S, T = 3, 8
LOW = torch.finfo(torch.float32).min


def rows() -> torch.Tensor:
    return torch.arange(T - S, T)[:, None]


def columns() -> torch.Tensor:
    return torch.arange(T)[None]


def slopes() -> torch.Tensor:
    return 2.0 ** -torch.arange(1, HEADS + 1)[:, None, None]


MADE = {
    "none": (lambda x: None, "none"),
    "tril": (lambda x: torch.ones(S, T, dtype=torch.bool).tril(T - S), "causal"),
    "triu of -inf": (lambda x: torch.triu(torch.full((S, T), float("-inf")), T - S + 1), "causal"),
    "hidden future": (lambda x: torch.zeros(S, T).masked_fill(columns() > rows(), LOW), "causal"),
    "not": (lambda x: ~(columns() > rows()), "causal"),
    "turned": (lambda x: rows() >= columns(), "causal"),
    "distance": (lambda x: rows() - columns() >= 0, "causal"),
    "window": (lambda x: (columns() <= rows()) & (columns() > rows() - 4), "causal + window"),
    "window by distance": (lambda x: (rows() - columns() < 4) & (columns() <= rows()), "causal + window"),
    "band": (lambda x: (rows() - columns()).abs() < 4, "window"),
    "blocks": (lambda x: (rows() // 4 == columns() // 4) & (columns() <= rows()), "causal + block"),
    "prefix": (lambda x: (columns() <= rows()) | (columns() < 3), "causal + bidirectional"),
    "alibi": (lambda x: slopes() * (columns() - rows()), "bias"),
    "alibi, causal": (
        lambda x: (slopes() * (columns() - rows())).masked_fill(columns() > rows(), float("-inf")),
        "causal + bias",
    ),
    "unknown": (lambda x: x.sin()[:1, :, :T] > 0.1, "unknown"),
    "unknown and causal": (lambda x: (x.sin()[:1, :, :T] > 0.1) & (columns() <= rows()), "causal + unknown"),
    "random bias": (lambda x: x[:1, :, :T].sin(), "unknown"),
}


@pytest.mark.parametrize("name", MADE)
def test_made_by_hand(name: str) -> None:
    make, expected = MADE[name]

    def forward(self: Any, x: torch.Tensor, cache: Any) -> Any:
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        return self.finish(attend(q, k, v, attn_mask=make(x))), (k, v)

    found = table(layer(forward), hidden(S), past(T - S))
    assert [site.to_dict()["mask_kind"] for site in found] == [expected]
    assert f"({expected})" in str(found) or expected == "none"


def assigned(mask: torch.Tensor) -> torch.Tensor:
    """As transformers 4.4x to 5.0 and much remote code make it."""
    made = torch.triu(torch.full((S, T), LOW), diagonal=1)
    made *= columns() > rows()
    made = made[None, None].expand(2, 1, -1, -1).clone()
    hidden = (made[:, :, :, :T] + mask[:, None, None, :]) == 0
    made[:, :, :, :T] = made[:, :, :, :T].masked_fill(hidden, LOW)
    return made[:, :, :, :T]


def assigned_number(mask: torch.Tensor) -> torch.Tensor:
    made = assigned(mask).clone()
    made[..., 2] = LOW
    return made


def filled(mask: torch.Tensor) -> torch.Tensor:
    made = assigned(mask).clone()
    made.mul_(mask[:, None, None].sin())
    return made


GIVEN = {
    "padding, assigned": (torch.ones(2, T).long(), assigned, "causal + padding"),
    "a number, assigned": (torch.ones(2, T), assigned_number, "unknown"),
    "changed in place": (torch.ones(2, T), filled, "unknown"),
    "padding": (torch.ones(2, T), lambda m: m[:, None, None, :].bool(), "padding"),
    "padding, added": (torch.ones(2, T), lambda m: (1.0 - m[:, None, None, :]) * LOW, "padding"),
    "padding, compared": (torch.ones(2, T).long(), lambda m: (m != 0)[:, None, None, :], "padding"),
    "lengths": (torch.ones(2, T), lambda m: (columns() < m.sum(-1, keepdim=True))[:, None, None], "padding"),
    "from outside": (torch.ones(2, 1, S, T).bool(), lambda m: m, "unknown"),
    "one-hot segments": (torch.ones(2, T).long(), lambda m: m[:, None, -S:, None] == m[:, None, None], "block"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_made_of_an_input(name: str) -> None:
    given, make, expected = GIVEN[name]

    def forward(self: Any, x: torch.Tensor, cache: Any, mask: torch.Tensor) -> Any:
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=make(mask), enable_gqa=True)
        return self.finish(y), (k, v)

    (site,) = table(layer(forward), hidden(S), past(T - S), given).sites
    assert site.to_dict()["mask_kind"] == expected


def test_a_learned_bias() -> None:
    def forward(self: Any, x: torch.Tensor, cache: Any) -> Any:
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        bias = self.table(columns() - rows() + T).permute(2, 0, 1)
        return self.finish(attend(q, k, v, attn_mask=bias)), (k, v)

    made = layer(forward, table=torch.nn.Embedding(2 * T, HEADS))
    (site,) = table(made, hidden(S), past(T - S)).sites
    assert site.to_dict()["mask_kind"] == "bias"


def test_a_product_with_a_size() -> None:
    """A symbolic size has no dtype."""
    graph = fx.Graph()
    mask, size = graph.placeholder("mask"), graph.placeholder("size")
    mask.meta["example_value"], size.meta["example_value"] = torch.ones(1, 1, S, T), free_size(ShapeEnv(), "size")
    product = graph.call_function(operator.mul, (mask, size))
    product.meta["example_value"] = torch.ones(1, 1, S, T)
    assert mask_kind([(product, MaskKind.ADD)], causal=True) == "causal + unknown"
