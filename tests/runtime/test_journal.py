"""The journal of a store: after any steps and any taking back, all of it is bit for bit a copy from before."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from kvpass.kernels.after_call.reindex import Reindex, reindex
from kvpass.kernels.budget import kept
from kvpass.kernels.decode_attend import decode_attend
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.ragged import is_ragged
from kvpass.kernels.testing import bits, qkv
from kvpass.kernels.timing import Timing
from models.states import arriving, builtin, state_under

from kvpass.runtime.drafts import Block
from kvpass.runtime.identity import Origin
from kvpass.runtime.journal import FACTS, Journal, changes_everything
from kvpass.runtime.pick import take_back
from kvpass.runtime.store import SlotStore
from kvpass.terms import Layout

SEEN = 80
WAITING = {f"{name}, every 3": Rule(*builtin()[name], Timing(every=3)) for name in ("h2o", "snapkv_int4", "ada_snapkv")}
RULES = builtin() | WAITING
SOME = ("h2o", "ada_snapkv", "h2o, every 3", "layer_defensivekv", "snapkv_int4", "mikv", "cam", "d2o", "kivi", "roco",
        "streaming_llm_reindexed", "cascading")  # fmt: skip


def begun(rule: Rule) -> SlotStore:
    """A store after SEEN tokens."""
    state = state_under(rule, SEEN)
    store = SlotStore("site", 0, rule, (Layout.BHTD, Layout.BHTD), Origin("p", 0.3), state, SEEN, spare=5)
    store.used = state.slots - 2 if is_ragged(state.cursor) else kept(rule, SEEN)
    store.step, store.zero = torch.rand(8, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.complex128)
    return store


def step(store: SlotStore, seed: int, depth: int = 0) -> None:
    """A token, as a compiled graph and the steps around it let it come; tentative if there is a depth."""
    rule, at = store.rule, store.tokens
    if depth:
        Block(depth).note(store, 1)
    store.make_room(1, step=True)
    q, k, v = qkv(2, 4, 2, 1, 16, keys=1, seed=seed)
    arrive = arriving(rule, at)
    decode_attend(q, k, v, None, store.state.tensors(), at, 0.3, rule.of_steps.encode(), arrive=arrive)
    if rule[Timing].every > 1:
        store.waiting += 1
        if store.waiting == rule[Timing].every:
            store.evict_deferred()
    if rule[Reindex].reindex:
        reindex(store.state, rule, store.step)
    store.tokens, store.calls, store.outside = at + 1, store.calls + 1, store.outside + 1


def same(store: SlotStore, copied: SlotStore) -> None:
    for field, one, other in zip(store.state.fields, store.state.tensors(), copied.state.tensors(), strict=True):
        assert one.shape == other.shape, field.name
        assert torch.equal(bits(one), bits(other)), field.name
    for name in FACTS:
        one, other = getattr(store, name), getattr(copied, name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name


@pytest.mark.parametrize("name", RULES)
def test_every_tensor_is_what_it_was(name: str) -> None:
    """Six steps, in which heads grow, evict, merge, demote and are laid out anew, of which four are taken back."""
    store = begun(RULES[name])
    for seed in range(2):
        step(store, seed, depth=8)
    before = copy.deepcopy(store)
    for seed in range(2, 6):
        step(store, seed, depth=8)
    assert not torch.equal(bits(store.state.pos), bits(before.state.pos)) or store.state.slots != before.state.slots
    assert take_back(store, SEEN + 2)
    same(store, before)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_random_steps_and_crops(name: str, recorded: bool) -> None:
    """Against a copy after each step; where steps are recorded, addresses change only where the state grows."""
    store, draw = begun(RULES[name]), random.Random(len(name))
    store.recorded = recorded
    copies, reach = [copy.deepcopy(store)], 0
    for turn in range(30):
        act = draw.random()
        if act < 0.6:
            step(store, draw.randrange(99), depth=5)
            copies.append(copy.deepcopy(store))
            reach = min(reach + 1, 5)
        elif act < 0.7:  # a call that settles what is there
            store.journal, reach = None, 0
            step(store, turn)
            copies.append(copy.deepcopy(store))
        else:
            count = draw.randint(1, 3)
            if count > reach and store.rule.evicts:
                assert not take_back(store, store.tokens - count)
            elif count <= reach:
                twin = copy.deepcopy(store)
                del copies[-count:]
                for one in (store, twin):
                    assert take_back(one, one.tokens - count)
                    same(one, copies[-1])
                reach -= count
    same(store, copies[-1])


def test_undoing_keeps_addresses() -> None:
    """A recorded step is good for the addresses that it was made with."""
    store = begun(WAITING["h2o, every 3"])
    store.recorded = True
    store.make_room(1, step=True)
    for seed in range(2):
        step(store, seed, depth=8)
    before = [t.data_ptr() for t in store.state.tensors()]
    for seed in range(4):
        step(store, seed, depth=8)
    assert take_back(store, SEEN + 2)
    assert [t.data_ptr() for t in store.state.tensors()] == before


def test_a_token_costs_a_slot_and_what_belongs_to_slots() -> None:
    """Of keys and values one slot is copied, of positions, statistics and the cursor everything; no more than `depth`
    tokens are kept.
    """
    store = begun(builtin()["h2o"])
    for seed in range(9):
        step(store, seed, depth=4)
    journal, state = store.journal, store.state
    assert journal is not None
    assert len(journal.entries) == 4
    one_slot = 2 * 2 * (16 + 16) * 4
    small = sum(t.numel() * t.element_size() for t in (state.pos, state.stats, state.cursor))
    assert journal.entries[-1].bytes == small + one_slot + 2 * 2 * 8
    assert journal.bytes <= 4 * journal.entries[-1].bytes


def test_which_rules_are_copied_whole() -> None:
    """Those whose steps merge or turn keys. A list that grows only with a reason: a token costs a copy of the cache."""
    whole = {name.split(",")[0] for name, rule in RULES.items() if changes_everything(rule, False)}
    assert whole == {"cam", "d2o", "merging", "razor_attention", "cascading", "finch", "streaming_llm_reindexed"}
    assert all(changes_everything(rule, True) for rule in WAITING.values())


def test_a_call_that_failed_leaves_no_trace() -> None:
    store: Any = begun(builtin()["h2o"])
    step(store, 0, depth=4)
    before = copy.deepcopy(store)
    Block(4).note(store, 1)  # and then the call failed
    step(store, 1, depth=4)
    assert take_back(store, SEEN + 1)
    same(store, before)


def test_a_call_that_failed_before_its_step_keeps_no_other() -> None:
    """What came before it can still be taken back."""
    store: Any = begun(builtin()["h2o"])
    before = copy.deepcopy(store)
    step(store, 0, depth=4)
    Block(4).note(store, 1)  # and then there was no memory to grow
    assert take_back(store, SEEN)
    same(store, before)


def test_what_came_since_is_not_taken_for_tentative() -> None:
    """A journal that a later token does not belong to says nothing."""
    store = begun(builtin()["h2o"])
    step(store, 0, depth=4)
    step(store, 1)
    assert not take_back(store, SEEN)
    assert isinstance(store.journal, Journal)
