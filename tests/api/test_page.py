"""`kvpass.page` read by an independent parser: what it shows is what `kvpass.inspect` finds in the cache."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import plain, tiny
from oracle.page_reader import PageReader
from spelling import cache_of, with_cache
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import kvpass
from kvpass.debug import report as debug_report
from kvpass.errors import CacheError

LENGTHS = [90, 61]
"""Tokens of two rows; the second has 29 columns of padding in front."""

T = LENGTHS[0] + 1


def compiled(model: Any, policy: Any = "h2o", budget: Any = 24, **options: Any) -> Any:
    return kvpass.compile(model.eval(), policy, budget, inner="eager", **options)


def converse(model: Any) -> Any:
    """A padded prompt of two rows, and a step."""
    ids, mask = tiny.left_padded(LENGTHS)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, use_cache=True)
        more = torch.cat([mask, mask.new_ones(2, 1)], 1)
        out = model(input_ids=ids[:, -1:], attention_mask=more, use_cache=True, **with_cache(model, cache_of(out)))
    return cache_of(out)


def latents() -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "first_k_dense_replace": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16,
        "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
        "pad_token_id": 0,
    }  # fmt: skip
    return DeepseekV2ForCausalLM(DeepseekV2Config(**sizes))


def plain_tuple() -> Any:
    model = compiled(plain.make(plain.Decoder))
    with torch.no_grad():
        return model(plain.tokens(2, T), None)[1]


CACHES: dict[str, Callable[[], Any]] = {
    "h2o": lambda: converse(compiled(tiny.llama())),
    "merged": lambda: converse(compiled(tiny.llama(), "d2o")),
    "heads with budgets of their own": lambda: converse(compiled(tiny.llama(), "ada_snapkv", 40)),
    "keys that are turned": lambda: converse(compiled(tiny.llama(), "streaming_llm_reindexed")),
    "layers that share": lambda: converse(compiled(tiny.llama(), "layer_defensivekv", 48)),
    "everything": lambda: converse(compiled(tiny.llama(), "full", None)),
    "codes": lambda: converse(compiled(tiny.llama(), "h2o_int8", 60)),
    "demoted": lambda: converse(compiled(tiny.llama(), "mikv", 0.5)),
    "latents": lambda: converse(compiled(latents())),
    "tuples": plain_tuple,
}


@functools.cache
def made(kind: str) -> Any:
    """Nobody changes it."""
    return CACHES[kind]()


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.some(5)
def test_positions_are_those_of_inspect(kind: str) -> None:
    cache = made(kind)
    page = PageReader(kvpass.page(cache))
    for view in kvpass.inspect(cache).layers:
        at = page.layer(view.name)
        rows, heads, _ = view.positions.shape
        assert page.data["layers"][at]["heads"] == heads
        for row in range(rows):
            for head in range(heads):
                expected = [int(p) for p in view.positions[row, head] if p >= 0]
                assert page.positions("held", row, at, head) == expected
                assert page.data["live"][row][at][head] == len(expected)
    assert page.data["report"] == kvpass.report(cache).to_dict()


def test_padding_is_told_from_what_is_gone() -> None:
    page = PageReader(kvpass.page(made("everything")))
    assert page.data["first"] == [0, 29]
    for row, first in enumerate(page.data["first"]):
        assert page.positions("held", row, 0, 0) == list(range(first, T))
    assert page.data["whole"] == [[None, None], [None, None]]


def test_codes_are_told_from_whole_tokens() -> None:
    """`h2o_int8` holds the first 4 and the newest 32 tokens whole too, of those that stay."""
    page = PageReader(kvpass.page(made("codes")))
    for row, first in enumerate(page.data["first"]):
        expected = {*range(first, first + 4), *range(T - 32, T)}
        for head in (0, 1):
            held = page.positions("held", row, 1, head)
            whole = page.positions("whole", row, 1, head)
            assert whole == [p for p in held if p in expected]
            assert len(whole) < len(held)


def test_demoted_tokens_stay_as_codes() -> None:
    """No token goes, and as many are whole as `inspect`'s host says: half of the bytes."""
    cache = made("demoted")
    page = PageReader(kvpass.page(cache))
    demoted = 0
    for row, first in enumerate(page.data["first"]):
        for layer in (0, 1):
            for head in (0, 1):
                held, whole = (page.positions(field, row, layer, head) for field in ("held", "whole"))
                assert held == list(range(first, T))
                assert set(whole) <= set(held)
                demoted += len(held) - len(whole)
    assert demoted == kvpass.report(cache).to_dict()["proof"]["demoted"] > 0


def test_sliding_windows_hold_the_last_columns() -> None:
    """In the model's order, the layers that stay dense among the others."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**tiny.SIZES, num_hidden_layers=3, layer_types=kinds, sliding_window=70)
    cache = converse(compiled(Gemma3ForCausalLM(config)))
    page = PageReader(kvpass.page(cache))
    assert [layer["number"] for layer in page.data["layers"]] == [0, 1, 2]
    assert [bool(layer["note"]) for layer in page.data["layers"]] == [True, False, True]
    for row, first in enumerate(page.data["first"]):
        for at in (0, 2):
            columns = cache.layers[at].keys.shape[2]
            assert columns == 69
            assert page.positions("held", row, at, 1) == list(range(max(T - columns, first), T))


def test_a_declined_layer_holds_everything() -> None:
    class Odd(plain.TupleBlock):
        def core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
            hidden = ~plain.causal_mask(q.shape[2], k.shape[2] - q.shape[2])
            return torch.sin(q @ k.transpose(-1, -2)).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    model = plain.make(plain.Decoder)
    model.blocks[1].__class__ = Odd
    with torch.no_grad():
        cache = compiled(model, strict=False)(plain.tokens(2, T), None)[1]
    spans = {"all": (0, T)}
    page = PageReader(kvpass.page(cache, spans=spans))
    assert [page.positions("held", 1, 1, head) for head in (0, 1)] == [list(range(T))] * 2
    (row, _) = kvpass.report(cache, spans).to_dict()["spans"]
    assert (row["heads"], row["kept"], row["gone"]) == (4, (2 * 24 + 2 * T) / (4 * T), 0)


def test_keys_of_another_sequence_have_no_positions_here() -> None:
    config = T5Config(vocab_size=97, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = compiled(T5ForConditionalGeneration(config))
    with torch.no_grad():
        out = model(input_ids=tiny.tokens(1, 60), decoder_input_ids=tiny.tokens(1, T), use_cache=True)
    data = PageReader(kvpass.page(cache_of(out))).data
    assert sorted(layer["heads"] for layer in data["layers"]) == [0, 4]
    assert all("no positions of this sequence" in layer["note"] for layer in data["layers"] if not layer["heads"])


class Tokenizer:
    """Decodes as sentencepiece does: no space in front of a text."""

    def decode(self, ids: list[int]) -> str:
        return {1: "", 2: "</script><script>alert(1)</script>"}.get(ids[0], f"word{ids[0]}")

    def convert_ids_to_tokens(self, one: int) -> str:
        return "<s>" if one == 1 else f"\u2581word{one}" if one % 2 else f"word{one}"


def test_texts_of_tokens() -> None:
    cache = made("h2o")
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    html = kvpass.page(cache, ids, tokenizer=Tokenizer())
    page = PageReader(html)
    hard = "</script><script>alert(1)</script>"
    assert page.data["texts"] == [["<1>", hard, " word3", "word4"], [" word5", "word6", " word7", "word8"]]
    assert hard not in html
    assert PageReader(kvpass.page(cache, ids)).data["texts"][0] == [" 1", " 2", " 3", " 4"]
    strings = [["a"] * (T + 5), ["b"]]
    assert PageReader(kvpass.page(cache, strings)).data["texts"] == [["a"] * T, ["b"]]
    assert PageReader(kvpass.page(cache)).data["texts"] is None
    with pytest.raises(CacheError, match="tokens of 1 sequences, for a cache of 2"):
        kvpass.page(cache, ["a", "b"])
    with pytest.raises(CacheError, match="str, not ids"):
        kvpass.page(cache, "a text")
    with pytest.raises(CacheError, match="no compressed cache in this list"):
        kvpass.page([])


def test_it_needs_no_network_and_little_room(tmp_path: Path) -> None:
    """Nothing is loaded, and a head costs a bit for each position, in base64, if no other head holds the same."""
    cache = made("layers that share")
    path = kvpass.page(cache, path=tmp_path / "cache.html")
    assert path == tmp_path / "cache.html"
    html = path.read_text()
    assert html == kvpass.page(cache)
    page = PageReader(html)
    assert not [a for a in page.attributes if a[1] in ("src", "href", "srcset", "data", "action")]
    assert set(re.findall(r"\w+://[\w.]+", html)) == {"http://www.w3.org"}  # SVG's name, which nobody asks
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", html)
    bitmaps = page.data["bitmaps"]
    assert 1 < len(bitmaps) == len(set(bitmaps)) <= 8
    assert {len(bitmap) for bitmap in bitmaps} == {4 * math.ceil(math.ceil(T / 8) / 3)}
    with pytest.raises(CacheError, match="no page at"):
        kvpass.page(cache, path=tmp_path / "nowhere" / "cache.html")


def test_one_bitmap_for_heads_that_hold_the_same() -> None:
    data = PageReader(kvpass.page(made("everything"))).data
    assert len(data["bitmaps"]) == 2  # one for each row
    assert data["held"] == [[[0, 0], [0, 0]], [[1, 1], [1, 1]]]


def test_the_debug_report_links_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when another graph is written later; pages elsewhere are not its business."""
    monkeypatch.setattr(debug_report, "_FOLDERS", {})
    monkeypatch.setattr(debug_report, "_PAGES", {})
    folder = tmp_path / "report"
    model = compiled(plain.make(plain.Decoder), debug=str(folder))

    def index() -> str:
        return (folder / "index.html").read_text()

    with torch.no_grad():
        cache = model(plain.tokens(1, T), None)[1]
        assert "kvpass.page(cache, tokens, " in index()
        kvpass.page(cache, path=tmp_path / "elsewhere.html")
        assert "elsewhere" not in index()
        kvpass.page(cache, path=folder / "first turn.html")
        assert "kvpass.page(cache, tokens, " not in index()
        before = index()
        cache = model(plain.tokens(1, 1), cache)[1]
    for text in (before, index()):
        links = [value for tag, name, value in Links(text).found if tag == "a" and name == "href"]
        assert links.count("first%20turn.html") == 1
        assert "elsewhere" not in text
    assert "graph_002" in index()
    assert "graph_002" not in before


class Links(PageReader):
    """Of a page without data."""

    def __init__(self, page: str) -> None:
        super().__init__(f'{page}<script id="data">{{}}</script>')
        self.found = self.attributes
