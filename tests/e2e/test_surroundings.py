"""What `generate` is asked for beside tokens: as the unmodified model does it at full budget, with real eviction below,
or refused by name before any work.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from models import plain, tiny
from models.turns import GREEDY
from spelling import cache_of, with_cache
from torch import Tensor
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration, TextIteratorStreamer

import kvpass
from kvpass.errors import CacheError, KVPassError, StaleCacheError, TrainingError

E: dict[str, Any] = {"inner": "eager"}
QUARTER = {"name": "mine", "extends": "h2o", "min_slots": 8}
BUDGET = 20


@pytest.fixture
def models(one_trace: None) -> tuple[Any, Any, Any]:
    """The model, and compiled at full budget and at a quarter of the prompt."""
    model = tiny.one_llama(layers=1)
    return model, kvpass.compile(model, "full", **E), kvpass.compile(model, QUARTER, BUDGET, **E)


def generated(model: Any, ids: Tensor, new: int = 6, **asked: Any) -> Any:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **GREEDY, **asked)


IDS = tiny.tokens(2, 80)


def live(out: Any) -> int:
    return int(kvpass.report(cache_of(out)).to_dict()["sites"][0]["live_max"])


@pytest.mark.parametrize(
    "asked",
    [
        {"output_hidden_states": True, "output_scores": True, "output_logits": True},
        {"prefill_chunk_size": 30},
        {"cache_implementation": "static"},
        {"cache_implementation": "hybrid"},
    ],
    ids=str,
)
def test_what_works(models: tuple[Any, Any, Any], asked: dict[str, Any]) -> None:
    want, full, small = (generated(one, IDS, **asked) for one in models)
    assert torch.equal(full.sequences, want.sequences)
    for name in ("scores", "logits"):
        for got, expected in zip(full.get(name) or (), want.get(name) or (), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    if "output_hidden_states" in asked:
        for step, expected in zip(full.hidden_states, want.hidden_states, strict=True):
            for got, theirs in zip(step, expected, strict=True):
                torch.testing.assert_close(got, theirs, atol=1e-3, rtol=1e-3)
        assert len(small.hidden_states) == 6
        assert torch.equal(small.logits[-1].argmax(-1), small.sequences[:, -1])
    assert live(small) == BUDGET
    assert type(cache_of(small)) is type(cache_of(want))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"output_attentions": True}, "output_attentions=True"),
        *(({"cache_implementation": name}, f"cache_implementation='{name}'")
          for name in ("offloaded", "offloaded_static", "offloaded_hybrid", "quantized", "paged")),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused_before_any_work(models: tuple[Any, Any, Any], asked: dict[str, Any], told: str) -> None:
    for compiled in models[1:]:
        graphs = len(compiled.kvpass.graphs)
        with pytest.raises(CacheError, match=told) as caught:
            generated(compiled, IDS, **asked)
        assert caught.value.hint
        assert len(compiled.kvpass.graphs) == graphs


def test_embeddings_in_the_first_and_in_later_turns(models: tuple[Any, Any, Any]) -> None:
    embed, outs = models[0].get_input_embeddings(), []
    for model in models:
        rows = embed(IDS).detach()
        asked = {"max_new_tokens": 6, **GREEDY}
        out = model.generate(inputs_embeds=rows, attention_mask=torch.ones_like(IDS), **asked)
        so_far = torch.cat([IDS, out.sequences, tiny.tokens(2, 9, seed=5)], 1)
        given = {"attention_mask": torch.ones_like(so_far), **with_cache(model, cache_of(out)), **asked}
        again = model.generate(inputs_embeds=embed(so_far).detach(), **given)
        outs.append((out.sequences, again.sequences))
        small = again
    assert all(torch.equal(a, b) for a, b in zip(*outs[:2], strict=True))
    by_tokens = generated(models[2], IDS)
    assert torch.equal(outs[2][0], by_tokens.sequences[:, 80:]), "embeddings are tokens in another form"
    assert live(small) == BUDGET
    assert kvpass.report(cache_of(small)).to_dict()["tokens"] == 100


class Mine(DynamicCache):
    """A caller's own, which counts."""

    updates = 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.updates += 1
        return super().update(*args, **kwargs)


def test_a_cache_class_of_the_callers(models: tuple[Any, Any, Any]) -> None:
    outs = [generated(model, IDS, **with_cache(model, Mine(config=model.config))) for model in models]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert live(outs[2]) == BUDGET
    assert [cache_of(out).updates for out in outs] == [6, 6, 6]


class Words:
    """A tokenizer of numbers."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(f"{int(one)} " for one in ids)


def test_streams_from_a_worker_thread(models: tuple[Any, Any, Any]) -> None:
    ids = IDS[:1]
    for model in models[1:]:
        streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=120)
        out: list[Any] = []
        worker = Thread(target=lambda m=model, s=streamer, o=out: o.append(generated(m, ids, streamer=s)))
        worker.start()
        text = "".join(streamer)
        worker.join()
        assert [int(word) for word in text.split()] == out[0].sequences[0, 80:].tolist()
        assert torch.equal(out[0].sequences, generated(model, ids).sequences)


def test_another_history_is_refused(models: tuple[Any, Any, Any]) -> None:
    """transformers would feed other tokens, or all of them again, without a word."""
    for model in models[1:]:
        out = generated(model, IDS)
        said = torch.cat([out.sequences, tiny.tokens(2, 4, seed=5)], 1)
        edited = said.clone()
        edited[1, 33] = 96 - edited[1, 33]
        for wrong, told in (
            (said[:, :85], "given 85 tokens, but its cache holds 85"),
            (said[:, :60], "given 60 tokens, but its cache holds 85"),
            (said[:, -4:], "given 4 tokens"),
            (edited, "token 33 of row 1"),
        ):
            before = copy.deepcopy(cache_of(out))
            with pytest.raises(StaleCacheError, match=told) as caught:
                generated(model, wrong, **with_cache(model, cache_of(out)))
            assert caught.value.hint
            assert kvpass.report(before).to_dict() == kvpass.report(cache_of(out)).to_dict()
        with pytest.raises(Exception, match=r"match|size|shape"):  # of a mask that is one short, as the model
            model.generate(said, attention_mask=torch.ones(2, 89), **with_cache(model, before), max_new_tokens=2)
        again = generated(model, said, **with_cache(model, cache_of(out)))
        assert again.sequences.shape == (2, 96)


class Chat(torch.nn.Module):
    """A `generate` of one's own, which takes the new tokens alone."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor, cache: Any) -> Any:
        return self.inner(ids, **with_cache(self.inner, cache), use_cache=True).logits

    @torch.no_grad()
    def generate(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        return torch.cat([ids, self(ids, cache)[:, -1:].argmax(-1)], 1)


def test_a_generate_of_ones_own_may_take_new_tokens_alone() -> None:
    model, said = Chat(tiny.one_llama()), []
    for each in (model, kvpass.compile(model, "full", inner="eager")):
        cache = DynamicCache(config=model.inner.config)
        said.append([each.generate(tiny.tokens(1, n, seed=n), cache=cache) for n in (40, 3, 1)])
    assert all(map(torch.equal, *said))


def test_tokens_taken_back_may_be_others(models: tuple[Any, Any, Any]) -> None:
    """A cropped cache goes on with another end, as the model's own."""
    found = []
    for model in models[:2]:
        out = generated(model, IDS)
        cache = cache_of(out)
        cache.crop(-3)
        said = torch.cat([out.sequences[:, :82], tiny.tokens(2, 6, seed=9)], 1)
        found.append(generated(model, said, **with_cache(model, cache)).sequences)
    assert torch.equal(*found)


def test_train_mode_and_gradient_checkpointing() -> None:
    model = tiny.llama(layers=1)
    model.activation_checkpointing_enable() if hasattr(model, "activation_checkpointing_enable") else (
        model.gradient_checkpointing_enable()
    )
    compiled = kvpass.compile(model, QUARTER, BUDGET, **E)
    want = generated(compiled, IDS)
    assert live(want) == BUDGET
    compiled.train()
    with pytest.raises(TrainingError, match="train mode"):
        generated(compiled, IDS)
    compiled.eval()
    assert torch.equal(generated(compiled, IDS).sequences, want.sequences)


def test_encoder_and_decoder() -> None:
    """Self-attention evicts, cross-attention stays dense; at full budget the model's tokens."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 97}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=None)).eval()
    outs = [
        generated(one, tiny.tokens(2, 12), new=40, eos_token_id=None)
        for one in (model, kvpass.compile(model, "full", **E), kvpass.compile(model, QUARTER, 10, **E))
    ]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert live(outs[2]) == 10
    cache = cache_of(outs[2])
    assert cache.cross_attention_cache.layers[0].keys.shape[2] == 12
    assert torch.isfinite(cache.cross_attention_cache.layers[0].keys).all()


PICKLED: dict[str, tuple[Any, int | None]] = {
    "h2o": ("h2o", 48),
    "ragged": ("ada_snapkv", 48),
    "tiers": ({"name": "mine", "extends": "h2o", "evicted": {"to": "int2"}, "min_slots": 8}, 48),
    "kivi": ("kivi", None),
}


def through_torch(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", PICKLED)
def test_pickles_go_on(policy: str, tmp_path: Path) -> None:
    """As the cache itself does; into a file too, before anything else was done with it."""
    model = kvpass.compile(tiny.one_llama(layers=1), *PICKLED[policy], **E)
    out = generated(model, IDS)
    more = torch.cat([out.sequences, tiny.tokens(2, 4, seed=5)], 1)
    again = [pickle.loads(pickle.dumps(cache_of(out))), through_torch(cache_of(out))]
    kvpass.Cache(again[0]).save(tmp_path / "a")
    again.append(kvpass.Cache.load(tmp_path / "a", model).host)
    want, *found = (generated(model, more, **with_cache(model, one)).sequences for one in (cache_of(out), *again))
    assert all(torch.equal(want, one) for one in found)


LOADER = """
import pickle, sys
sys.path[:0] = ["examples", "tests/models"]
import tiny, torch, kvpass
from spelling import with_cache
cache, more = pickle.loads(open(sys.argv[1], "rb").read())
model = kvpass.compile(tiny.llama(layers=1), "h2o", 48, inner="eager")
given = {"attention_mask": torch.ones_like(more), **with_cache(model, cache)}
print(model.generate(more, max_new_tokens=4, do_sample=False, **given).tolist())
"""


@pytest.mark.wide  # test_saved.py has the like of it in CI
def test_a_pickle_in_another_process(tmp_path: Path) -> None:
    model = kvpass.compile(tiny.llama(layers=1), "h2o", 48, **E)
    out = generated(model, IDS)
    more = torch.cat([out.sequences, tiny.tokens(2, 4, seed=5)], 1)
    (tmp_path / "a").write_bytes(pickle.dumps((cache_of(out), more)))
    asked = [sys.executable, "-P", "-c", LOADER, str(tmp_path / "a")]
    run = subprocess.run(asked, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    want = generated(model, more, new=4, **with_cache(model, cache_of(out)))
    assert run.stdout.strip() == str(want.sequences.tolist())
    other = tiny.llama(layers=1)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    other = kvpass.compile(other, "h2o", 48, **E)
    with pytest.raises(StaleCacheError, match="other weights"):
        generated(other, more, **with_cache(other, pickle.loads((tmp_path / "a").read_bytes())[0]))


def test_what_is_not_pickled() -> None:
    """Buffers of the caller's; caches of torch.compile, whose tensors are plain; a cropped cache."""
    model = kvpass.compile(plain.make(plain.Decoder), "h2o", 40, **E)
    with torch.no_grad():
        _, cache = model(plain.tokens(1, 60), None)
    for wrong in (copy.copy, lambda shell: pickle.dumps(shell[:, :, :50])):
        with pytest.raises(KVPassError, match=r"pickled|newest"):
            wrong(cache[0][0])
    with torch.no_grad():
        _, cache = torch.compile(plain.make(plain.Decoder), backend=kvpass.backend("h2o", 40, **E))(
            plain.tokens(1, 60), None
        )
    with pytest.raises(CacheError, match=r"cannot be pickled(.|\n)*Cache\(cache\)\.save"):
        pickle.dumps(cache)
