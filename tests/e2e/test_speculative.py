"""Speculative decoding under policies that evict: token for token what plain greedy decoding gives, and the same slots
kept. The judge is the compiled model itself without drafts, of which other tests know that it is right.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import plain, tiny
from models.turns import GREEDY
from spelling import cache_of, with_cache

import kvpass
from kvpass.runtime.journal import Journal

NEW = 20
BASE = {"name": "small", "min_slots": 12}
TARGETS: dict[str, tuple[Any, Any]] = {
    "everything": ({**BASE, "extends": "h2o"}, 1.0),
    "a quarter": ({**BASE, "extends": "h2o"}, 0.25),
    "slots": ("h2o", 24),
    "a window": ({**BASE, "extends": "snapkv", "observe": {"queries": 8}, "protect": {"recent": 8}}, 0.25),
    "ragged": ({**BASE, "extends": "ada_snapkv", "observe": {"queries": 8}, "protect": {"recent": 8}}, 24),
    "every": ({**BASE, "extends": "h2o", "every": 6}, 0.25),
    "flat": ({**BASE, "extends": "h2o", "allocate": {"layers": "flat"}}, 0.25),
    "int4": ({**BASE, "extends": "h2o", "store": {"k": "int4", "v": "int4", "residual": 4, "sinks": 2}}, 0.25),
    "tiers": ({**BASE, "extends": "h2o", "evicted": {"to": "int2"}}, 0.25),
    "merges": ({**BASE, "extends": "cam"}, 0.25),
    "fitted": ({**BASE, "extends": "kivi", "store": {"residual": 8}}, 1.0),
    "turned": ({**BASE, "extends": "streaming_llm_reindexed"}, 24),
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens were taken back, each time."""
    found: list[int] = []
    take_back = Journal.take_back

    def noted(self: Journal, store: Any, length: int) -> bool:
        found.append(store.tokens - length)
        return take_back(self, store, length)

    monkeypatch.setattr(Journal, "take_back", noted)
    return found


def prompt() -> torch.Tensor:
    return torch.cat([tiny.tokens(1, 14)] * 4, 1)


def kept(out: Any) -> list[torch.Tensor]:
    return [layer.positions for layer in kvpass.inspect(cache_of(out)).layers]


def same(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences, want.sequences)
    for mine, theirs in zip(kept(got), kept(want), strict=True):
        assert torch.equal(mine, theirs)


pytestmark = pytest.mark.usefixtures("one_trace", "drafting")


@pytest.fixture
def drafting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Drafts of four tokens, however sure the assistant is. How transformers calls an assistant it calls deprecated."""
    config = tiny.one_llama().generation_config
    monkeypatch.setattr(config, "assistant_confidence_threshold", 0.0)
    monkeypatch.setattr(config, "num_assistant_tokens", 4)
    yield
    for handler in logging.getLogger("transformers").handlers:
        getattr(handler, "said", []).clear()  # of conftest.py


def compiled(name: str) -> Any:
    policy, budget = TARGETS[name]
    return kvpass.compile(tiny.one_llama(), policy, budget, inner="eager")


def greedy(model: Any, **asked: Any) -> Any:
    return model.generate(prompt(), max_new_tokens=NEW, **GREEDY, **asked)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.some(6)
def test_prompt_lookup_is_plain_decoding(name: str, taken: list[int]) -> None:
    model = compiled(name)
    want = greedy(model)
    same(greedy(model, prompt_lookup_num_tokens=4), want)
    assert (name == "everything") != any(taken)
    if name != "everything":
        assert len(model.kvpass.graphs) <= 3, "drafts are tried in the graphs of plain decoding"


@pytest.mark.parametrize("name", ["slots", "ragged", "tiers"])
def test_a_dense_assistant_and_a_compressed_one(name: str, taken: list[int]) -> None:
    """The original of the target guesses right until something that mattered is gone; the target as its own assistant
    guesses right but for its prompt, of which the last token comes apart.
    """
    model = compiled(name)
    want = greedy(model)
    same(greedy(model, assistant_model=tiny.one_llama()), want)
    assert any(taken)
    same(greedy(model, assistant_model=kvpass.compile(tiny.one_llama(), "h2o", 24, inner="eager")), want)


def test_an_assistant_of_an_unmodified_model(taken: list[int]) -> None:
    """Its cache is shortened over calls and rounds, and its drafts are what it says without having been shortened."""
    target = tiny.one_llama()
    want = target.generate(prompt(), max_new_tokens=NEW, **GREEDY)
    for name in ("slots", "ragged"):
        taken.clear()
        got = target.generate(prompt(), max_new_tokens=NEW, assistant_model=compiled(name), **GREEDY)
        assert torch.equal(got.sequences, want.sequences)
        assert max(taken) > 1


@pytest.mark.parametrize("name", ["a quarter", "ragged"])
def test_a_model_that_leaves_itself_early(name: str, taken: list[int]) -> None:
    model = compiled(name)
    want = greedy(model)
    same(greedy(model, assistant_early_exit=1), want)
    assert any(taken)


def test_a_preallocated_cache() -> None:
    """Its host counts tokens back in place. transformers drafts beyond its end where it looks up the prompt."""
    model = compiled("slots")
    want, static = greedy(model), {"cache_implementation": "static"}
    same(greedy(model, assistant_model=tiny.one_llama(), **static), want)
    with pytest.raises(kvpass.KVPassError, match="prompt lookup"):
        greedy(model, prompt_lookup_num_tokens=4, **static)


@torch.no_grad()
@pytest.mark.parametrize("name", ["slots", "ragged", "tiers", "turned"])
@pytest.mark.some(2)
def test_a_loop_of_ones_own(name: str) -> None:
    """Padded rows; drafts in one call, some of them dropped, a token behind them: as if those had never been."""
    model, (ids, mask) = compiled(name), tiny.left_padded([40, 33])
    told = torch.cat([mask, torch.ones(2, 8, dtype=torch.long)], 1)
    drafts, positions = tiny.tokens(2, 5, seed=7), (told.cumsum(-1) - 1).clamp(min=0)
    asked = {"attention_mask": mask, "position_ids": positions[:, :40], "use_cache": True}
    begun = [cache_of(model(ids, **asked)) for _ in range(2)]
    positions = positions[:, 40:]
    with kvpass.tentative(depth=8):
        many = model(drafts, attention_mask=told[:, :45], position_ids=positions[:, :5], **with_cache(model, begun[0]))
    want = [
        model(
            drafts[:, at : at + 1],
            attention_mask=told[:, : 41 + at],
            position_ids=positions[:, at : at + 1],
            **with_cache(model, begun[1]),
        )
        for at in range(2)
    ]
    assert torch.equal(many.logits[:, :2], torch.cat([one.logits for one in want], 1))
    begun[0].crop(-3)
    for mine, theirs in zip(*(kvpass.inspect(one).layers for one in begun), strict=True):
        assert torch.equal(mine.positions, theirs.positions)
    last = tiny.tokens(2, 1, seed=9)
    both = [
        model(last, attention_mask=told[:, :43], position_ids=positions[:, 2:3], **with_cache(model, one)).logits
        for one in begun
    ]
    assert torch.equal(*both)


@torch.no_grad()
def test_a_shorter_tuple() -> None:
    """A tree of drafts: what hangs on an older tuple takes the newer ones back, and those are refused from then on."""
    model = kvpass.compile(plain.one(plain.Decoder), "h2o", 12, inner="eager")
    base = model(plain.tokens(1, 30))[1]
    with kvpass.tentative():
        one, first = model(plain.tokens(1, 1, seed=1), base)
        other, second = model(plain.tokens(1, 1, seed=2), base)
        again, third = model(plain.tokens(1, 1, seed=1), base)
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        for gone in (first, second):
            with pytest.raises(kvpass.KVPassError, match="taken back"):
                model(plain.tokens(1, 1, seed=3), gone)
        with pytest.raises(kvpass.KVPassError, match="one by one"):
            model(plain.tokens(1, 2, seed=3), third)


@torch.no_grad()
def test_what_cannot_be_taken_back() -> None:
    """More than the depth, a prompt, tokens that a later call has settled: told by name, with what to do."""
    model = kvpass.compile(plain.one(plain.Decoder), "h2o", 12, inner="eager")
    for depth, settle, count, words in (
        (2, False, 4, "last 2 tokens are tentative"),
        (8, True, 1, "kvpass.tentative"),
        (8, False, 6, "last 4 tokens are tentative"),
    ):
        cache = model(plain.tokens(1, 30))[1]
        with kvpass.tentative(depth):
            for seed in range(4):
                cache = model(plain.tokens(1, 1, seed=seed), cache)[1]
        if settle:
            cache = model(plain.tokens(1, 1), cache)[1]
        with pytest.raises(kvpass.KVPassError, match=words) as caught:
            model(plain.tokens(1, 1), [(k[:, :, :-count], v[:, :, :-count]) for k, v in cache])
        assert "what to do" in str(caught.value)


@torch.no_grad()
def test_what_cannot_be_parted() -> None:
    model = compiled("slots")
    given = with_cache(model, cache_of(greedy(model)))
    with kvpass.tentative():
        for asked in ({"output_attentions": True}, {"return_dict": False}, {"labels": tiny.tokens(1, 3)}):
            with pytest.raises(kvpass.KVPassError, match=next(iter(asked))):
                model(tiny.tokens(1, 3), **given, **asked)
        hidden = model(tiny.tokens(1, 3), **given, output_hidden_states=True, logits_to_keep=2)
    assert hidden.logits.shape[1] == 2
    assert {layer.shape[1] for layer in hidden.hidden_states} == {3}
    for depth in (0, True, 2.0):
        with pytest.raises(kvpass.KVPassError, match="depth"), kvpass.tentative(depth):  # type: ignore[arg-type]  # what is refused
            pass
