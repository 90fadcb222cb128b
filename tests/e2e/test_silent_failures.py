"""Eight ways in which the reference library is wrong and does not say so, each a test of ours. The judge is the
unmodified model with masks in the place of evictions (tests/oracle), or bytes of live tensors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from models.memory import grown, kv_bytes, live
from models.turns import GREEDY
from oracle.drive import Conversation, kept_positions
from oracle.hf import Oracle
from spelling import cache_of, with_cache
from transformers import DynamicCache, StaticCache

import kvpass
from kvpass.runtime.journal import Journal

pytestmark = pytest.mark.usefixtures("one_trace")
BUDGET, PROMPT, NEW = 48, 80, 12


def compiled(policy: str = "h2o") -> Any:
    return kvpass.compile(tiny.one_llama(6, 2, layers=1), policy, BUDGET, inner="eager")


def oracle(policy: str = "h2o") -> Oracle:
    return Oracle(tiny.one_llama(6, 2, layers=1), policy, BUDGET)


def generated(model: Any, ids: torch.Tensor, **asked: Any) -> Any:
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{"max_new_tokens": NEW, **GREEDY, **asked})


def test_1_a_plain_call_after_eviction_has_the_right_positions() -> None:
    """model(ids, cache) and no more: token 80 stands at 80, not behind the 48 slots that are left."""
    talk = Conversation(tiny.one_llama(6, 2, layers=1), "h2o", BUDGET, inner="eager")
    token = talk.call(tiny.tokens(1, PROMPT))
    assert talk.cache.get_seq_length() == PROMPT
    talk.call(token)  # compares logits, and which positions are kept
    assert all(int(layer.max()) == PROMPT for layer in kept_positions(talk.cache))
    talk.call(tiny.tokens(1, 5, seed=1))
    assert all(int(layer.max()) == PROMPT + 5 for layer in kept_positions(talk.cache))


@pytest.mark.parametrize("policy", ["knorm", "snapkv"])
def test_2_left_padded_batches_keep_no_padding(policy: str) -> None:
    talk = Conversation(tiny.one_llama(6, 2, layers=1), policy, BUDGET, inner="eager")
    ids, mask = tiny.left_padded([PROMPT, 30])
    token = talk.call(ids, mask)
    for _ in range(2):
        for layer in kept_positions(talk.cache):
            padding = (layer[1] >= 0) & (layer[1] < PROMPT - 30)
            assert not padding.any()
            assert (layer[1] >= 0).any(-1).all()
        token = talk.decode(token, 3)


def test_3_chunked_prefills_are_compressed() -> None:
    """Each chunk of its own, and by `generate`."""
    talk = Conversation(tiny.one_llama(6, 2, layers=1), "h2o", BUDGET, inner="eager")
    ids = tiny.tokens(1, 150)
    for chunk in ids.split(60, dim=1):
        token = talk.call(chunk)
        assert max(int((layer >= 0).sum(-1).max()) for layer in kept_positions(talk.cache)) == BUDGET
    out = generated(compiled(), ids, prefill_chunk_size=60)
    assert out.sequences[0, 150] == token
    assert max(int((layer >= 0).sum(-1).max()) for layer in kept_positions(cache_of(out))) == BUDGET


def test_4_ada_kv_frees_memory() -> None:
    """Live bytes of keys and values: the budget's within 3 %, though heads hold different numbers of them."""
    model, dim = tiny.one_llama(4, 2, 64), 64
    run, before = kvpass.compile(model, "ada_snapkv", 0.2, inner="eager"), live()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        run(tiny.tokens(2, 600), **with_cache(run, cache), logits_to_keep=1)
    dense = 2 * 2 * 2 * 2 * 600 * dim * 4  # layers, K and V, rows, KV heads
    held = kv_bytes(grown(before), dim)
    assert 0.2 * dense <= held <= 0.2 * dense * 1.03
    counts = torch.stack([(layer >= 0).sum(-1) for layer in kept_positions(cache)])
    assert len(set(counts.flatten().tolist())) > 1


def test_5_speculative_decoding_is_plain_greedy_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token for token what the model with masks says one by one, though drafts were tried and taken back."""
    ids, taken = torch.cat([tiny.tokens(1, 20)] * 4, 1), []
    take_back = Journal.take_back
    monkeypatch.setattr(Journal, "take_back", lambda *args: taken.append(args) or take_back(*args))
    out = generated(compiled(), ids, prompt_lookup_num_tokens=4)
    assert torch.equal(out.sequences[:, PROMPT:], oracle().generate(ids, NEW))
    assert taken


def test_6_a_second_turn_feeds_no_token_again() -> None:
    """The cache has seen each token once, and says what it would say after having been told each once."""
    model, judge, prompt, more = compiled(), oracle(), tiny.tokens(1, PROMPT), tiny.tokens(1, 17, seed=4)
    first = generated(model, prompt)
    said = judge.generate(prompt, NEW)
    whole = torch.cat([first.sequences, more], 1)
    second = generated(model, whole, **with_cache(model, cache_of(first)))
    assert kvpass.Cache(second).tokens == second.sequences.shape[1] - 1 == PROMPT + NEW + 17 + NEW - 1
    want = judge.generate(torch.cat([said[:, -1:], more], 1), NEW)
    assert torch.equal(second.sequences[:, whole.shape[1] :], want)


def test_7_a_static_cache_works_with_a_prefill_and_steps() -> None:
    model, judge, ids = compiled(), oracle(), tiny.tokens(1, PROMPT)
    cache = StaticCache(config=model.config, max_cache_len=128)
    out = generated(model, ids, **with_cache(model, cache))
    assert torch.equal(out.sequences[:, PROMPT:], judge.generate(ids, NEW))
    judge.simulator.follow(kept_positions(cache))


def test_8_half_precision_with_budgets_of_heads_has_no_nan() -> None:
    """Beside a model of float32 with the same weights, whose choices half precision may see as ties."""
    half = tiny.llama(6, 2, layers=1).to(torch.float16)
    judge = Oracle(tiny.llama(6, 2, layers=1).to(torch.float16).float(), "ada_snapkv", BUDGET)
    judge.simulator.rounding = 2.0**-6
    model = kvpass.compile(half, "ada_snapkv", BUDGET, inner="eager")
    cache = DynamicCache(config=model.config)
    ids, mask = tiny.left_padded([PROMPT, 60])
    for step in range(6):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {"attention_mask": mask, "position_ids": positions}
        with torch.no_grad():
            got = model(ids, **given, **with_cache(model, cache), use_cache=True, logits_to_keep=1).logits[:, -1]
        want = judge(ids, **given)
        judge.simulator.follow(kept_positions(cache))
        assert got.isfinite().all()
        assert float((got - want).abs().max()) <= float(want.abs().max()) / 32
        ids, mask = tiny.tokens(2, 1, seed=step), torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    (layer,) = kvpass.inspect(cache).layers
    assert len(set((layer.positions >= 0).sum(-1).flatten().tolist())) > 1
