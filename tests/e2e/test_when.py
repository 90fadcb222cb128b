"""When evictions happen: at the end of each call, of calls of several tokens, of the first call, or once in so many
generated tokens. Positions equal the oracle's, and memory is what is held."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from models import tiny
from oracle.base import Policy
from oracle.drive import Conversation
from oracle.held import KeyDiff, Knorm, LagKV
from oracle.needs import CORM
from oracle.policies import H2O, AdaSnapKV, RoCo, SnapKV
from oracle.policies import StreamingLLMReindexed as Reindexed
from spelling import with_cache
from transformers import DynamicCache

import kvpass

pytestmark = pytest.mark.usefixtures("one_trace")

BUDGET = 48


class ShortLag(LagKV):
    lag = 8


LAG8 = {"extends": "lagkv", "options": {"block": 8}}
WAYS: list[tuple[Any, type[Policy], str, int]] = [
    ("h2o", H2O, "calls", 1),
    ("snapkv", SnapKV, "first", 1),
    ("knorm", Knorm, "first", 1),
    ("ada_snapkv", AdaSnapKV, "calls", 1),
    ("roco", RoCo, "always", 7),
    ("keydiff", KeyDiff, "always", 7),
    ("ada_snapkv", AdaSnapKV, "always", 7),
    ("streaming_llm_reindexed", Reindexed, "always", 7),
    ("corm", CORM, "calls", 1),
    (LAG8, ShortLag, "always", 9),
]


@pytest.mark.parametrize(("name", "kind", "when", "every"), WAYS, ids=str)
@pytest.mark.some(5)
def test_positions_are_the_oracles(name: Any, kind: type[Policy], when: str, every: int) -> None:
    """Padded rows, 20 steps, a second turn, 9 steps."""
    meaning = kind()
    meaning.when, meaning.every = when, every
    base = {"extends": name} if isinstance(name, str) else name
    policy = {"name": "late", **base, "when": when, "every": every}
    conversation = Conversation(tiny.one_llama(6, 2), policy, BUDGET, meaning=meaning, inner="eager")
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[1, :23] = 0
    token = conversation.call(tiny.tokens(2, 90) * mask, mask)
    token = conversation.decode(token, 20)
    token = conversation.call(torch.cat([token, tiny.tokens(2, 29, seed=1)], 1))
    conversation.decode(token, 9)
    simulator = conversation.simulator
    assert simulator.near_ties <= 0.005 * simulator.compared


def held(policy: dict[str, Any], turns: list[tuple[int, int]]) -> list[int]:
    """Slots allocated for each head after each call of several tokens, and after the steps behind it."""
    compiled = kvpass.compile(tiny.one_llama(4, 2), {"name": "late", **policy}, BUDGET, inner="eager")
    cache, out = DynamicCache(config=compiled.config), []
    for turn, (together, alone) in enumerate(turns):
        calls = [tiny.tokens(1, together, seed=turn), *(tiny.tokens(1, 1, seed=i) for i in range(alone))]
        for at, ids in enumerate(calls):
            with torch.no_grad():
                compiled(ids, **with_cache(compiled, cache))
            if at in (0, alone):
                report = kvpass.report(cache).to_dict()
                out.append(round(report["bytes"] * report["tokens"] / report["dense_bytes"]))
    return out


def test_memory_comes_back_with_the_next_call() -> None:
    """Generated tokens stay until the next call of several tokens, and their slots are freed then."""
    first, grown, again = held({"extends": "h2o", "when": "calls"}, [(100, 60), (20, 0)])[:3]
    assert max(first, again) <= BUDGET + 2
    assert BUDGET + 60 <= grown <= (BUDGET + 60) * 1.025 + 1


def test_memory_of_one_compression() -> None:
    assert held({"extends": "h2o", "when": "first"}, [(100, 10), (20, 10)])[-1] >= BUDGET + 40


def test_memory_stays_below_the_budget_and_what_waits() -> None:
    assert max(held({"extends": "h2o", "every": 8}, [(100, 60)])) <= (BUDGET + 8) * 1.025 + 1


def test_a_fraction() -> None:
    """Budgets that grow with what was seen, and steps that wait."""
    meaning = H2O()
    meaning.every = 5
    policy = {"name": "late", "extends": "h2o", "every": 5, "min_slots": 16}
    conversation = Conversation(tiny.one_llama(4, 2), policy, 0.3, meaning=meaning, inner="eager")
    conversation.simulator.budget = type(conversation.simulator.budget)(fraction=Fraction(3, 10), floor=16)
    conversation.decode(conversation.call(tiny.tokens(1, 100)), 24)
