"""The seam of the state: a field per slot and a field per head that only this test knows go through everything that
happens to slots, and nothing outside of this file is told of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kvpass.kernels.rule import Record, Rule
from kvpass.kernels.slots.moves import even, rows_of
from kvpass.kernels.slots.state import Field
from models import plain

import kvpass
from kvpass.plan import plan
from kvpass.runtime.shell import find

FRESH, UNSET = 7, 0.5
"""What the made-up fields hold before anybody writes to them."""


@dataclass(frozen=True)
class MadeUp(Record):
    """Slots keep a number, and heads another."""

    made_up: bool = False

    @property
    def state_fields(self) -> tuple[Field, ...]:
        number = Field("number", "BHC", torch.int32, FRESH)
        return (number, Field("weight", "BH", torch.float32, UNSET)) if self.made_up else ()


pytestmark = pytest.mark.usefixtures("one_trace")

POLICIES = {
    "evicts": ("h2o", 12),
    "grows": ("h2o", 0.6),
    "keeps all": ("full", None),
    "steps grow": ({"name": "mine", "extends": "h2o", "when": "calls"}, 12),
    "evictions wait": ({"name": "mine", "extends": "h2o", "every": 3}, 12),
    "scorer": ("keydiff", 12),
    "uneven heads": ("ada_snapkv", 40),
    "uneven layers": ("layer_defensivekv", 40),
    "turned keys": ("streaming_llm_reindexed", 12),
    "rings": ("cascading", 16),
}


@pytest.fixture
def ruled(monkeypatch: pytest.MonkeyPatch) -> None:
    real = plan.rule_of
    monkeypatch.setattr(plan, "rule_of", lambda *args: Rule(*real(*args), MadeUp(True)))


class Chat:
    """A model whose layers' states are watched."""

    def __init__(self, policy: Any, budget: Any) -> None:
        spec = {"name": "small", "extends": policy, "min_slots": 4} if isinstance(policy, str) else policy
        self.model = kvpass.compile(plain.one(plain.Decoder), spec, budget, inner="eager")
        self.cache: Any = None
        self.marked = 0

    @torch.no_grad()
    def tell(self, *counts: int) -> None:
        for count in counts:
            self.cache = self.model(plain.tokens(2, count), self.cache)[1]
            self.check()

    @property
    def stores(self) -> list[Any]:
        return [find(keys) for keys, _ in self.cache]

    def mark(self) -> None:
        """Give each slot in use a number by its position, and each head a weight."""
        for store in self.stores:
            state = store.state
            state.number.copy_(torch.where(state.pos >= 0, 3 * state.pos + 1, state.number))
            state.weight.copy_(torch.arange(state.weight.numel()).view_as(state.weight))
        self.marked = self.stores[0].tokens

    def check(self) -> None:
        """What was marked goes where its token goes; tokens that came since begin with the fill."""
        for store in self.stores:
            held = even(store.state)
            used = held.pos >= 0
            wanted = torch.where(held.pos < self.marked, 3 * held.pos + 1, FRESH)
            assert used.any()
            assert torch.equal(held.number[used], wanted[used])
            heads = torch.arange(held.weight.numel()).view_as(held.weight)
            assert torch.equal(held.weight, heads.float() if self.marked else torch.full_like(held.weight, UNSET))
            assert store.state.number.dtype is torch.int32
            assert store.state.number.shape == store.state.pos.shape


@pytest.mark.parametrize("name", POLICIES)
def test_they_go_through_everything(name: str, ruled: None) -> None:
    """Prefill, steps with growth and evictions, a second turn, more steps, a deep copy that goes its own way."""
    chat = Chat(*POLICIES[name])
    chat.tell(64, 1, 1)
    before = [store.slots for store in chat.stores]
    chat.mark()
    chat.tell(*[1] * 30)
    if name in ("grows", "keeps all", "steps grow"):
        assert all(store.slots > slots for store, slots in zip(chat.stores, before, strict=True))
    chat.tell(20)
    twin = copy.copy(chat)
    twin.cache = copy.deepcopy(chat.cache)
    for store, other in zip(chat.stores, twin.stores, strict=True):
        assert other.state.number.data_ptr() != store.state.number.data_ptr()
        assert other.state.weight.data_ptr() != store.state.weight.data_ptr()
    twin.mark()
    twin.tell(1, 1, 5)
    chat.tell(1, 1)
    overhead = chat.stores[0].overhead_bytes
    known = sum(t.nbytes for t in (chat.stores[0].state.pos, chat.stores[0].state.stats, chat.stores[0].state.cursor))
    assert overhead == known + chat.stores[0].state.number.nbytes + chat.stores[0].state.weight.nbytes


def test_rows_are_picked_with_them(ruled: None) -> None:
    chat = Chat("h2o", 12)
    chat.tell(30, 1)
    chat.mark()
    state = chat.stores[0].state
    picked = rows_of(state, torch.tensor([1, 1, 0]))
    assert torch.equal(picked.number, state.number[[1, 1, 0]])
    assert torch.equal(picked.weight, state.weight[[1, 1, 0]])


def test_a_rule_says_them_in_its_text() -> None:
    rule = Rule(MadeUp(True), slots=9)
    assert "made_up=1" in rule.encode()
    assert Rule.parse(rule.encode()) == rule
