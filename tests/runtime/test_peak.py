"""What eviction itself needs for a moment: at most one layer above what is held before and after, also while growing.

Measured by what torch's allocator hands out and takes back, on states of two rows and two heads that are large beside
everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvpass.kernels.after_call.deferred import evicted
from kvpass.kernels.after_call.layers import shared_out
from kvpass.kernels.after_call.reindex import Reindex, reindex
from kvpass.kernels.codecs.storage import coded
from kvpass.kernels.join_slots import join_slots
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.moves import evened, with_slots, with_spare
from kvpass.kernels.slots.ragged import is_ragged
from kvpass.kernels.slots.state import State
from kvpass.kernels.timing import Timing
from models import tiny
from models.memory import peak
from models.states import builtin, state_under
from spelling import with_cache
from transformers import DynamicCache

import kvpass
from kvpass.runtime.identity import Origin
from kvpass.runtime.store import SlotStore
from kvpass.terms import Layout

SEEN, DIM, NEW = 4000, 64, 16
SLACK = 1.15
"""Positions and indices of the slots, and pieces that are carried at once."""
RULES = builtin()
SOME = ("h2o", "ada_snapkv", "roco", "layer_defensivekv", "snapkv_int4", "mikv", "cam", "streaming_llm_reindexed")


def layer_bytes(state: State) -> int:
    return state.bytes(entries=True) + state.bytes(entries=False)


def check(run: Callable[[], Any], layer: int) -> None:
    highest, _ = peak(run)
    assert 0 < highest <= SLACK * layer, f"{highest / layer:.2f} layers for a moment"


@torch.no_grad()
@pytest.mark.parametrize("name", SOME)
def test_growing(name: str) -> None:
    """A layer with more slots is a copy, and no more than that."""
    state = state_under(RULES[name], SEEN, dim=DIM)
    check(lambda: with_slots(state, state.slots + 30), layer_bytes(state))
    if is_ragged(state.cursor):
        check(lambda: with_spare(state, 30), layer_bytes(state))


@torch.no_grad()
@pytest.mark.parametrize("name", SOME)
def test_a_second_prompt(name: str) -> None:
    """What its queries see is one layer, dense: the slots and the new tokens in one piece. Where heads lie one behind
    the other, or hold codes, they are laid out or read first: two.
    """
    rule = RULES[name]
    if rule[ShareOut].share:
        return
    state = state_under(rule, SEEN, dim=DIM)
    k, v = torch.randn(2, 2, 2, NEW, DIM).unbind()
    slots = SEEN if is_ragged(state.cursor) else state.slots
    dense = 4 * 4 * (slots + NEW) * (2 * DIM + 4)
    first = is_ragged(state.cursor) or bool(coded(rule))
    check(lambda: join_slots(state.tensors(), k, v, SEEN, rule.encode()), (2 if first else 1) * dense)


@torch.no_grad()
@pytest.mark.parametrize("name", ["h2o", "ada_snapkv", "snapkv_int4"])
def test_evictions_that_waited(name: str) -> None:
    rule = Rule(*RULES[name], Timing(every=3))
    state = state_under(rule, SEEN, dim=DIM)
    check(lambda: evicted(state, rule), layer_bytes(state))


@torch.no_grad()
@pytest.mark.parametrize("name", ["streaming_llm_reindexed", "cascading", "finch"])
def test_turning_keys(name: str) -> None:
    rule = RULES[name]
    assert rule[Reindex].reindex
    state = state_under(rule, 8 * SEEN, dim=DIM)
    check(lambda: reindex(state, rule, torch.rand(DIM // 2, dtype=torch.float64)), layer_bytes(state))


@torch.no_grad()
@pytest.mark.parametrize("name", ["layer_defensivekv", "cake"])
def test_layers_that_share_out(name: str) -> None:
    """They hold all their candidates until the last layer is known, as docs/policies.md says; then one at a time."""
    rule = RULES[name]
    states = [evened(state_under(rule, SEEN, dim=DIM, seed=seed), NEW) for seed in range(3)]

    def share() -> None:  # of copies: what was there before it is measured is not seen to go
        copies, left = [state.clone() for state in states], []
        for state, _ in shared_out(copies, [rule] * 3, 30):
            left.append(state)

    layers = sum(map(layer_bytes, states))
    highest, _ = peak(share)
    assert layers < highest <= layers + SLACK * layer_bytes(states[0])


class Run:
    """A compiled model of so many layers, and its cache."""

    def __init__(self, layers: int, policy: Any, budget: Any) -> None:
        self.model = kvpass.compile(tiny.llama(4, 4, 64, layers=layers), policy, budget, inner="eager")
        self.cache = DynamicCache(config=self.model.config)

    def call(self, tokens: int) -> None:
        with torch.no_grad():
            self.model(tiny.tokens(1, tokens), **with_cache(self.model, self.cache), use_cache=True, logits_to_keep=1)


@pytest.mark.parametrize(("policy", "budget"), [("h2o", 300), ("ada_snapkv", 300)])
def test_a_prompt_holds_one_dense_layer_at_a_time(policy: str, budget: int) -> None:
    """Above what is left of it a prompt needs as much with six layers as with two."""
    above = []
    for layers in (2, 6):
        run = Run(layers, policy, budget)
        run.call(3000)  # compiles
        run.cache = DynamicCache(config=run.model.config)
        highest, end = peak(lambda run=run: run.call(3000))
        above.append(highest - end)
    dense = 2 * 4 * 3000 * 64 * 4
    assert above[1] <= above[0] + dense / 6


@torch.no_grad()
@pytest.mark.parametrize("name", ["h2o", "ada_snapkv"])
def test_all_layers_grow_one_by_one(name: str) -> None:
    """In one step, of some forty."""
    rule = RULES[name]
    states = [state_under(rule, SEEN, dim=DIM, seed=seed) for seed in range(4)]
    layouts, found = (Layout.BHTD, Layout.BHTD), []

    def grow() -> None:
        for at, state in enumerate(states):
            found.append(SlotStore("site", at, rule, layouts, Origin("p", 0.3), state.clone(), 2 * SEEN))
        for store in found:
            store.make_room(1, step=True)

    highest, end = peak(grow)
    assert all(store.slots > state.slots for store, state in zip(found, states, strict=True))
    assert end < highest <= end + SLACK * layer_bytes(found[0].state)
