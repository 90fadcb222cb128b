"""`kvpass.report` beside an independent measure: the memory behind every tensor that a conversation left alive."""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import plain, tiny
from models.styles import gpt_fast, llama_reference
from models.styles.style import make
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import kvpass
from kvpass.errors import CacheError

WITHIN = 0.03
PROMPT = 300
NAME = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What this version of transformers calls it."""


def compiled(model: Any, policy: Any = "h2o", budget: Any = 0.25, **options: Any) -> Any:
    return kvpass.compile(model.eval(), policy, budget, inner="eager", **options)


def converse(model: Any, cache: Any = None) -> Any:
    """The cache after a prompt and a step of a causal LM of transformers."""
    given = {} if cache is None else {NAME: cache}
    with torch.no_grad():
        out = model(input_ids=tiny.tokens(1, PROMPT), use_cache=True, **given)
        out = model(input_ids=tiny.tokens(1, 1), use_cache=True, **{NAME: out[NAME]})
    return out[NAME]


def gemma3(model: Any = None) -> tuple[Any, Callable[[Any], Any]]:
    """Five layers with a window, one with all tokens."""
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    config = Gemma3TextConfig(**tiny.SIZES, num_hidden_layers=4, layer_types=kinds, sliding_window=64)
    return compiled(Gemma3ForCausalLM(config)), converse


class Odd(plain.TupleBlock):
    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        hidden = ~plain.causal_mask(q.shape[2], k.shape[2] - q.shape[2])
        logits = torch.sin(q @ k.transpose(-1, -2)).masked_fill(hidden, -torch.inf)
        return logits.softmax(-1) @ v


class OddAttribute(plain.AttributeBlock):
    core = Odd.core


def with_odd(kind: Any, odd: Any) -> Any:
    """A decoder whose last block no pattern knows."""
    model = plain.make(kind)
    model.blocks[1].__class__ = odd
    return compiled(model, strict=False)


def tuples(model: Any) -> Any:
    with torch.no_grad():
        cache = model(plain.tokens(1, PROMPT), None)[1]
        return model(plain.tokens(1, 1), cache)[1]


def attributes(model: Any) -> Any:
    for block in model.blocks:
        block.ck = block.cv = None
    with torch.no_grad():
        for length in (PROMPT, 1):
            model(plain.tokens(1, length))
    return model


def t5() -> tuple[Any, Callable[[Any], Any]]:
    config = T5Config(vocab_size=97, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return compiled(T5ForConditionalGeneration(config)), translate


def translate(model: Any) -> Any:
    """Cross-attention over 200 tokens, which stays dense."""
    source, target = tiny.tokens(1, 200), tiny.tokens(1, PROMPT)
    with torch.no_grad():
        out = model(input_ids=source, decoder_input_ids=target, use_cache=True)
        kept = {"encoder_outputs": (out.encoder_last_hidden_state,), NAME: out[NAME]}
        out = model(decoder_input_ids=target[:, :1], use_cache=True, **kept)
    return out[NAME]


def callers_static(model: Any) -> Any:
    """Buffers that the caller allocated before the first call."""
    cache = StaticCache(config=model.config, max_cache_len=400)
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    return converse(model, cache)


def lfm2() -> tuple[Any, Callable[[Any], Any]]:
    """Convolutions with a state, and full attention."""
    config = Lfm2Config(**tiny.SIZES, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])
    return compiled(Lfm2ForCausalLM(config)), converse


def style(kind: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Buffers in modules, allocated by the model itself."""

    def run(model: Any) -> Any:
        cache = model.init_cache(1, 512)
        with torch.no_grad():
            for start, length in ((0, PROMPT), (PROMPT, 1)):
                _, cache = model.step(plain.tokens(1, length), cache, start)
        return cache

    return compiled(make(kind)), run


HOSTS: dict[str, Callable[[], tuple[Any, Callable[[Any], Any]]]] = {
    "llama": lambda: (compiled(tiny.llama()), converse),
    "gemma3": gemma3,
    "declined layer": lambda: (with_odd(plain.Decoder, Odd), tuples),
    "declined layer in a module": lambda: (with_odd(plain.AttributeDecoder, OddAttribute), attributes),
    "T5": t5,
    "static cache": lambda: (compiled(tiny.llama()), callers_static),
    "hybrid": lfm2,
    "buffers in modules": lambda: style(gpt_fast.Transformer),
    "buffers as attributes": lambda: style(llama_reference.Llama),
}


def live() -> dict[int, Tensor]:
    """A tensor for every memory that some tensor of this process looks at."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and not isinstance(t, FakeTensor)]
    return {t.untyped_storage()._cdata: t for t in tensors if not t.is_meta}


def is_table(tensor: Tensor) -> bool:
    """Masks and angles that the styles make together with their caches."""
    return tensor.dtype == torch.bool or tuple(tensor.shape[1:]) == (4, 2)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.some(4)
def test_bytes_are_those_of_live_storage(host: str) -> None:
    """A second conversation, so that constants of the graphs are there before."""
    model, run = HOSTS[host]()
    run(model)
    before = live()
    cache = run(model)
    new = [t for address, t in live().items() if address not in before and not is_table(t)]
    held = sum(t.untyped_storage().nbytes() for t in new)
    data = kvpass.report(cache).to_dict()
    assert data["bytes"] + data["overhead_bytes"] == pytest.approx(held, rel=WITHIN)
    assert data["bytes"] == data["slot_bytes"] + data["caller_bytes"] + sum(row["bytes"] for row in data["dense"])


def read(model: Any, length: int) -> Any:
    with torch.no_grad():
        return model(plain.tokens(1, length), None)[1]


def test_text_folds_equal_rows_in_100_columns() -> None:
    """One line for twelve layers; the data keeps all rows."""
    model = compiled(plain.make(lambda: plain.Decoder(layers=12)), budget=24)
    report = kvpass.report(read(model, 60))
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines if "blocks" in line] == ["0-11"]
    assert "blocks.0-11" in str(report)
    assert len(report.to_dict()["sites"]) == 12
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("policy", "budget", "length", "words"),
    [
        ("h2o", 0.25, 60, "keeps 64 slots (min_slots)"),
        ("h2o", 0.25, 300, ""),
        ("h2o", 64, 60, "room for every token"),
        ("h2o", 24, 60, ""),
        ("full", None, 60, "keeps everything"),
    ],
)
def test_why_nothing_is_evicted(policy: str, budget: Any, length: int, words: str) -> None:
    """102 % of the dense bytes after a short prompt has a reason, in words."""
    report = kvpass.report(read(compiled(plain.make(plain.Decoder), policy, budget), length))
    data = report.to_dict()
    assert words in " ".join(str(report).split())
    assert bool(words) == bool(data["why"])
    assert bool(words) == (data["bytes"] >= data["dense_bytes"])


def test_proof_counts_what_happened() -> None:
    """Two rows, of which one begins with padding that no policy counts: 2 layers, 2 KV heads."""
    model = compiled(tiny.llama(), budget=24)
    ids, mask = tiny.left_padded([60, 41])
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, use_cache=True)
    cache, branch = out[NAME], copy.deepcopy(out[NAME])
    data = kvpass.report(cache).to_dict()
    seen, live = 2 * 2 * (60 + 41), 2 * 2 * (24 + 24)
    freed = data["dense_bytes"] - data["bytes"]
    expected = {"calls": 1, "seen": seen, "evicted": seen - live, "freed": freed, "outside": 0}
    assert data["proof"] == expected == kvpass.report(branch).to_dict()["proof"]
    mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
    with torch.no_grad():
        model(input_ids=ids[:, :1], attention_mask=mask, use_cache=True, **{NAME: branch})
    after = kvpass.report(branch).to_dict()["proof"]
    assert (after["calls"], after["seen"], after["evicted"]) == (2, seen + 8, seen + 8 - live)
    assert kvpass.report(cache).to_dict()["proof"] == expected
    assert f"proof: 2 calls, {after['evicted']} of {after['seen']} keys evicted" in str(kvpass.report(branch))


def test_proof_counts_steps_outside_the_graph() -> None:
    """Layers that share their slots by their data do so after each prompt, in Python."""
    cache = read(compiled(plain.make(plain.Decoder), "layer_defensivekv", 48), 60)
    assert kvpass.report(cache).to_dict()["proof"]["outside"] == 2


def mistral() -> Any:
    config = MistralConfig(**tiny.SIZES, num_hidden_layers=2, sliding_window=32, attn_implementation="sdpa")
    return MistralForCausalLM(config).eval()


def test_nothing_to_compress_by_choice() -> None:
    """A window in every layer: kvpass saw it, left it, and says so; of any other cache it knows nothing."""
    model = mistral()
    cache = converse(compiled(model))
    held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
    for one in (cache, copy.deepcopy(cache)):
        report = kvpass.report(one)
        data = report.to_dict()
        assert (data["policy"], data["budget"], data["tokens"], data["sites"]) == ("h2o", 0.25, None, [])
        assert data["bytes"] == data["dense_bytes"] > 0
        assert {row["reason"] for row in data["declined"]} == {"SLIDING_WINDOW"}
        assert "nothing in this cache is compressed" in str(report)
        assert "SLIDING_WINDOW" in str(report)
    assert kvpass.report(cache).to_dict()["bytes"] == held
    with pytest.raises(CacheError, match="no kvpass-compiled model made this DynamicCache") as caught:
        kvpass.report(converse(model))
    assert "explain" in caught.value.hint


def test_all_layers_declined() -> None:
    """strict=False, and no attention that is known: the report is of dense layers, with reasons."""
    model = plain.make(plain.Decoder)
    for block in model.blocks:
        block.__class__ = Odd
    data = kvpass.report(tuples(compiled(model, strict=False))).to_dict()
    assert data["bytes"] == data["dense_bytes"] == 2 * 2 * 2 * (PROMPT + 1) * 8 * 4
    assert [row["reason"] for row in data["declined"]] == ["UNSUPPORTED_ATTENTION"] * 2


def test_an_output_is_reported_by_its_cache() -> None:
    """Logits and hidden states beside the cache are none of it; nor are tables, weights or activations of a module."""
    model = compiled(tiny.llama(), budget=24)
    with torch.no_grad():
        out = model(input_ids=tiny.tokens(1, 60), use_cache=True)
    assert kvpass.report(out).to_dict() == kvpass.report(out[NAME]).to_dict()
    decoder = compiled(plain.make(plain.Decoder), budget=24)
    with torch.no_grad():
        pair = decoder(plain.tokens(1, 60), None)
    assert kvpass.report(pair).to_dict() == kvpass.report(pair[1]).to_dict()
    host = compiled(plain.make(plain.AttributeDecoder), budget=24)
    attributes(host)
    alone = kvpass.report(host).to_dict()
    host.register_buffer("positions", torch.ones(1, 400, 32))
    host.register_buffer("angles", torch.ones(1, 1, 400, 8))
    host.last = torch.ones(1, 60, 32)
    assert kvpass.report(host).to_dict() == alone
