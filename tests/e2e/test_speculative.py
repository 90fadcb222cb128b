"""Speculative decoding under policies that evict: token for token what plain greedy decoding gives, and the same slots
kept. The judge is the compiled model itself without drafts, of which other tests know that it is right.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from models.turns import GREEDY
from spelling import cache_of

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


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("name", TARGETS)
def test_prompt_lookup_is_plain_decoding(name: str, taken: list[int]) -> None:
    policy, budget = TARGETS[name]
    model = kvpass.compile(tiny.one_llama(), policy, budget, inner="eager")
    want = model.generate(prompt(), max_new_tokens=NEW, **GREEDY)
    got = model.generate(prompt(), max_new_tokens=NEW, prompt_lookup_num_tokens=4, **GREEDY)
    same(got, want)
    assert (name == "everything") != any(taken)
