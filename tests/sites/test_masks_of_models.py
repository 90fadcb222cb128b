"""What is said of masks of real models, over caches that grow and over buffers, and of masks that nobody can prove."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kvpass.patterns import DEFAULT
from models import tiny
from models.attention import HEADS, attend, hidden, layer, past
from models.graphs import capture_all, table
from spelling import with_cache
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM, StaticCache

from kvpass.sites.scan import scan

SMALL = {"vocab_size": 97, "hidden_size": 32, "pad_token_id": 0}
S, T = 3, 8
LOW = torch.finfo(torch.float32).min


def said(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, **more: Any) -> set[str]:
    graphs = capture_all(model, ids, attention_mask=mask, use_cache=True, **more)
    return {site.to_dict()["sees"] for gm in graphs for site in scan(gm, DEFAULT)}


def test_llama() -> None:
    ids, mask = tiny.left_padded([6, 4])
    assert said(tiny.llama(), ids, mask) == {"causal tokens"}
    assert said(tiny.llama(), ids, None) == {"causal"}


def test_bloom() -> None:
    """Its distances are added key by key; transformers 5.0 writes its mask in place."""
    model = BloomForCausalLM(BloomConfig(**SMALL, n_layer=2, n_head=4)).eval()
    ids, mask = tiny.left_padded([6, 4])
    (words,) = said(model, ids, mask)
    assert "adds a tensor by key" in words
    assert words == "causal mean tokens, and adds a tensor by key" or "reads a mask" in words


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
    expected = "causal window=4 tokens" if window else "causal tokens"
    assert said(model, ids, mask, **with_cache(model, cache)) == {expected}


def rows() -> torch.Tensor:
    return torch.arange(T - S, T)[:, None]


def columns() -> torch.Tensor:
    return torch.arange(T)[None]


def assigned(mask: torch.Tensor) -> torch.Tensor:
    """As transformers 4.4x to 5.0 and much remote code make it."""
    made = torch.triu(torch.full((S, T), LOW), diagonal=1)
    made *= columns() > rows()
    made = made[None, None].expand(2, 1, -1, -1).clone()
    gone = (made[:, :, :, :T] + mask[:, None, None, :]) == 0
    made[:, :, :, :T] = made[:, :, :, :T].masked_fill(gone, LOW)
    return made[:, :, :, :T]


GIVEN = {
    "assigned": (torch.ones(2, T).long(), assigned, "reads a mask"),
    "lengths": (torch.ones(2, T), lambda m: (columns() < m.sum(-1, keepdim=True))[:, None, None], "by key"),
    "from outside": (torch.ones(2, 1, S, T).bool(), lambda m: m, "reads a mask"),
    "segments": (torch.ones(2, T).long(), lambda m: m[:, None, -S:, None] == m[:, None, None], "reads a mask"),
    "a random bias": (torch.ones(2, T), lambda m: m[:, None, -S:, None].sin() * columns(), "reads a mask"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_made_of_an_input(name: str) -> None:
    given, make, expected = GIVEN[name]

    def forward(self: Any, x: torch.Tensor, cache: Any, mask: torch.Tensor) -> Any:
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=make(mask), enable_gqa=True)
        return self.finish(y), (k, v)

    found = table(layer(forward), hidden(S), past(T - S), given)
    (site,) = found.sites
    assert site.seen.read == (0,)
    assert expected in site.to_dict()["sees"]
    assert site.to_dict()["sees"] in str(found)


def test_a_learned_bias() -> None:
    def forward(self: Any, x: torch.Tensor, cache: Any) -> Any:
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        bias = self.table(columns() - rows() + T).permute(2, 0, 1)
        return self.finish(attend(q, k, v, attn_mask=bias)), (k, v)

    made = layer(forward, table=torch.nn.Embedding(2 * T, HEADS))
    (site,) = table(made, hidden(S), past(T - S)).sites
    assert site.seen.read == (0,)
    assert "reads a mask" in str(site.seen)
