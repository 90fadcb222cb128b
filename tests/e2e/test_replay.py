"""Policies that read a prompt again before they evict: kept positions against masks on the unmodified model, rows
alone, second turns, and no trace of what was read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import plain, tiny
from oracle.replay import Reader
from spelling import cache_of, with_cache
from transformers import DynamicCache, StaticCache

import kvpass
from kvpass.errors import CacheError, PolicyError

HEADS, KV_HEADS, SLOTS = 4, 2, 24
EVEN = {"extends": "kvzip", "allocate": {"layers": "uniform"}}
FLAT_HEADS = {"extends": "kvzip", "allocate": {"layers": "uniform", "heads": "flat", "safeguard": 0.0}}

QUESTIONS = {"extends": "retold", "name": "mine", "shortest": 16}


def bounded(policy: Any, chunk: int = 2000, shortest: int = 1) -> dict[str, Any]:
    """The policy with a budget at every token, of turns too, and with chunks that these small models can read."""
    own = {"extends": policy} if isinstance(policy, str) else policy
    return {**own, "name": "mine", "when": "always", "shortest": shortest, "options": {"chunk": chunk}}


class Chat:
    """Rows of a compiled model's cache."""

    def __init__(self, model: Any, policy: Any, budget: Any = SLOTS) -> None:
        self.model = kvpass.compile(model, policy, budget, inner="eager")
        self.cache = DynamicCache(config=model.config)
        self.mask: torch.Tensor | None = None

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        more: dict[str, Any] = {}
        if mask is not None or self.mask is not None:
            new = torch.ones_like(ids) if mask is None else mask
            self.mask = new if self.mask is None else torch.cat([self.mask, new], 1)
            positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            more = {"attention_mask": self.mask, "position_ids": positions}
        with torch.no_grad():
            return self.model(ids, use_cache=True, **with_cache(self.model, self.cache), **more).logits[:, -1]

    def kept(self, row: int = 0) -> list[list[list[int]]]:
        """[layer][head], numbers among the row's own tokens."""
        views = [view.positions[row] for view in kvpass.inspect(self.cache).layers]
        number = None if self.mask is None else (self.mask[row].cumsum(-1) - 1).tolist()
        own = [[[p for p in head.tolist() if p >= 0] for head in view] for view in views]
        return own if number is None else [[[number[p] for p in head] for head in layer] for layer in own]


CASES = {
    "kvzip": (bounded("kvzip"), {"share": "model"}),
    "in chunks": (bounded("kvzip", 30), {"share": "model", "chunk": 30}),
    "plus": (bounded("kvzip_plus"), {"share": "model", "normed": True}),
    "heads": (bounded(FLAT_HEADS), {"share": "heads"}),
    "even": (bounded(EVEN, 30), {"share": "even", "chunk": 30}),
}
STAYING = {
    "kvzip": ("kvzip", {"steps_evict": False}),
    "retold": ("retold", {"steps_evict": False, "summed": True, "recent": 16}),
    "budget always": (bounded("kvzip", 2000, 64), {}),
}


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("case", CASES)
def test_kept_positions(case: str) -> None:
    """A prompt, generated tokens, a second turn, generated tokens."""
    policy, means = CASES[case]
    model = tiny.one_llama(HEADS, KV_HEADS)
    chat, reader = Chat(model, policy), Reader(model, SLOTS, **means)
    reader.first, reader.later = [5, 6, 7], [8, 9]
    calls = [
        tiny.tokens(1, 70),
        *[tiny.tokens(1, 1, seed) for seed in (2, 3)],
        tiny.tokens(1, 40, 4),
        tiny.tokens(1, 1),
    ]
    with kvpass.instructed(reader.first, reader.later):
        for ids in calls:
            got, meant = chat(ids), reader(ids[0].tolist())
            assert chat.kept() == reader.kept(), ids.shape
            torch.testing.assert_close(got[0], meant.float(), atol=2e-3, rtol=1e-3)
    counts = [len(head) for layer in chat.kept() for head in layer]
    assert sum(counts) == SLOTS * len(counts)
    assert (len(set(counts)) == 1) == (case == "even")


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("case", STAYING)
def test_questions_stay(case: str) -> None:
    """A prompt, a question, its answer, and a longer turn, which is read again as the prompt was."""
    policy, means = STAYING[case]
    model = tiny.one_llama(HEADS, KV_HEADS)
    chat, reader = Chat(model, policy), Reader(model, SLOTS, shortest=64, **means)
    held = []
    for ids in [
        tiny.tokens(1, 70),
        tiny.tokens(1, 5, 2),
        tiny.tokens(1, 1, 3),
        tiny.tokens(1, 66, 4),
        tiny.tokens(1, 1),
    ]:
        got, meant = chat(ids), reader(ids[0].tolist())
        assert chat.kept() == reader.kept(), ids.shape
        torch.testing.assert_close(got[0], meant.float(), atol=2e-3, rtol=1e-3)
        held.append(sum(len(head) for layer in chat.kept() for head in layer) - 2 * KV_HEADS * SLOTS)
    more = 2 * KV_HEADS
    assert held == ([0] * 5 if case == "budget always" else [0, 5 * more, 6 * more, 0, more])


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize(
    "policy",
    [bounded("kvzip", 40), QUESTIONS, pytest.param(bounded(EVEN, 40), marks=pytest.mark.wide)],
    ids=["always", "one row's question", "even"],
)
def test_rows_alone(policy: Any) -> None:
    """Rows of unequal length, and a second turn that is padded too: a question in one row, long in the other."""
    model, lengths = tiny.one_llama(HEADS, KV_HEADS), [70, 33]
    chat, (ids, mask) = Chat(model, policy), tiny.left_padded(lengths)
    more, there = tiny.left_padded([5, 33], seed=9)
    step = tiny.tokens(2, 1, seed=3)
    chat(ids, mask)
    first = [chat.kept(row) for row in range(2)]
    chat(step)
    chat(more, there)
    for row, n in enumerate(lengths):
        alone = Chat(model, policy)
        alone(ids[row : row + 1, -n:])
        assert first[row] == alone.kept(), row
        alone(step[row : row + 1])
        alone(more[row : row + 1][:, there[row] > 0])
        assert chat.kept(row) == alone.kept(), row


@pytest.mark.usefixtures("one_trace", "in_torch")
def test_room_for_all() -> None:
    """Where nothing goes, a replay changes nothing: the logits and the slots are those of no replay, bit for bit."""
    model, ids = tiny.one_llama(HEADS, KV_HEADS), tiny.tokens(2, 40)
    for codes in ({}, {"store": "int4"}):
        both = [Chat(model, {**bounded("kvzip", 30), **codes}, 512), Chat(model, {"name": "all", **codes}, 1.0)]
        for tokens in (ids, tiny.tokens(2, 1), tiny.tokens(2, 50, seed=3), tiny.tokens(2, 1)):
            ours, theirs = (chat(tokens) for chat in both)
            torch.testing.assert_close(ours, theirs, atol=0 if codes else 1e-6, rtol=0 if codes else 1e-5)
            assert both[0].kept(1) == both[1].kept(1)
        assert both[0].cache.get_seq_length() == 92
        calls = [kvpass.report(chat.cache).to_dict()["proof"]["calls"] for chat in both]
        assert calls[0] == calls[1]


@pytest.mark.usefixtures("one_trace")
def test_bytes() -> None:
    """What is held is the budget, and room to grow, whatever was read again."""
    chat = Chat(tiny.one_llama(HEADS, KV_HEADS), {**bounded("kvzip", 64), "min_slots": 16}, 0.2)
    chat(tiny.tokens(2, 200))
    report = kvpass.report(chat.cache).to_dict()
    assert 0.2 <= report["bytes"] / report["dense_bytes"] <= 0.2 * 1.03 + 1 / 200
    assert [len(head) for layer in chat.kept() for head in layer] != [40] * 4


@pytest.mark.wide  # docs/policy-files.md generates in CI
def test_generate_in_parts() -> None:
    """`generate` with a prompt in parts, each of which is replayed; the history of a next turn is known."""
    model = kvpass.compile(tiny.llama(HEADS, KV_HEADS), "kvzip", SLOTS, inner="eager")
    asked = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "prefill_chunk_size": 32}
    out = model.generate(tiny.tokens(2, 64), attention_mask=torch.ones(2, 64, dtype=torch.long), **asked)
    cache = cache_of(out)
    assert cache.get_seq_length() == 67
    assert sum(int((view.positions >= 0).sum()) for view in kvpass.inspect(cache).layers) <= SLOTS * 2 * KV_HEADS * 2


@pytest.mark.usefixtures("one_trace")
def test_other_peoples_models() -> None:
    """A cache that nobody replayed is refused, and keeps all; `kvpass.replay` goes on with it."""
    torch.manual_seed(0)
    model = plain.one(plain.Decoder)
    compiled, ids = kvpass.compile(model, "kvzip", 16, inner="eager"), torch.randint(1, plain.VOCABULARY, (2, 40))
    with torch.no_grad():
        _, cache = compiled(ids, None)
        assert {view.positions.shape[2] for view in kvpass.inspect(cache).layers} == {40}
        with pytest.raises(CacheError, match="not replayed"):
            compiled(ids[:, :1], cache)
        assert "wait for kvpass.replay" in kvpass.report(cache).to_dict()["why"]
        with pytest.raises(CacheError, match="no padding"):
            kvpass.replay(compiled, cache, ids, mask=torch.arange(40).expand(2, -1) > 3)
        assert kvpass.replay(compiled, cache, ids) is cache
        assert sum(int((view.positions >= 0).sum()) for view in kvpass.inspect(cache).layers) == 16 * 2 * 2 * 2
        compiled(ids[:, :1], cache)
    with pytest.raises(CacheError, match="no token of this cache waits"):
        kvpass.replay(compiled, cache, ids)


@pytest.mark.usefixtures("one_trace")
def test_refused() -> None:
    model = tiny.one_llama(HEADS, KV_HEADS)
    compiled, ids = kvpass.compile(model, "kvzip", SLOTS, inner="eager"), tiny.tokens(1, 30)
    static = StaticCache(config=model.config, max_cache_len=128)
    with torch.no_grad(), pytest.raises(CacheError, match="preallocated"):
        compiled(ids, **with_cache(compiled, static))
    embeds, cache = model.get_input_embeddings()(ids).detach(), DynamicCache(config=model.config)
    with torch.no_grad():
        compiled(inputs_embeds=embeds, **with_cache(compiled, cache))
        with pytest.raises(CacheError, match=r"kvpass\.replay"):
            compiled(ids[:, :1], **with_cache(compiled, cache))
        kvpass.replay(compiled, cache, ids)
        compiled(ids[:, :1], **with_cache(compiled, cache))


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"score": "window_sum"}, "score"),
        ({"observe": {"replay": "none"}}, "observe.replay"),
        ({"options": {"chunk": 0}}, "options.chunk"),
        ({"shortest": 0}, "shortest"),
        ({"allocate": {"layers": "pyramid"}}, "allocate.layers"),
        ({"evicted": "merge"}, "evicted"),
        ({"positions": "reindexed"}, "positions"),
        ({"protect": {"tokens": True}}, "protect.tokens"),
        ({"when": "first"}, "when"),
    ],
)
def test_policies_that_cannot_be(said: dict[str, Any], field: str) -> None:
    with pytest.raises(PolicyError, match=field):
        kvpass.Policy.load({"name": "mine", "extends": "kvzip", **said})
