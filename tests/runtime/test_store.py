"""SlotStore: capacity, growth and bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvpass.kernels.budget import kept
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import FIRST, LIVE

from kvpass.runtime.identity import Origin
from kvpass.runtime.room import capacity, empty_state
from kvpass.runtime.shell import find, make, unwrap
from kvpass.runtime.store import SlotStore, sharing_storage
from kvpass.terms import Layout

RULES = [Rule(stats=("sum",), num=1, den=5, floor=64), Rule(slots=100), Rule()]


def store(rule: Rule = RULES[0], tokens: int = 500, dtype: torch.dtype = torch.float32) -> SlotStore:
    state = empty_state(rule, tokens, torch.empty(0, dtype=dtype), {"B": 2, "Hkv": 3, "D": 16, "Dv": 24})
    return SlotStore("site", 0, rule, (Layout.BHTD, Layout.BHTD), Origin("p", 0.2), state, tokens)


@given(st.sampled_from(RULES), st.integers(0, 100_000))
def test_capacity_is_the_budget_one_more_and_at_most_a_fortieth(rule, tokens):
    used, slots = kept(rule, tokens), capacity(rule, tokens)
    assert used < slots <= used * 1.025 + 1


@pytest.mark.parametrize("rule", RULES)
def test_there_is_always_room_for_one_more(rule):
    """Token by token over 3,000 tokens: room before each append, bytes near the budget, few copies."""
    grown, copies = store(rule, 0), 0
    for tokens in range(1, 3_000):
        before = grown.state.k.data_ptr()
        grown.make_room(1, step=True)
        grown.tokens = tokens
        copies += grown.state.k.data_ptr() != before
        assert kept(rule, tokens) < grown.slots <= kept(rule, tokens) * 1.025 + 2
    assert copies < 300


def test_growing_keeps_what_is_there():
    grown = store()
    before = [t.copy_(torch.randint(0, 9, t.shape)).clone() for t in grown.state.tensors()]
    slots = grown.slots
    grown.make_room(500, step=False)
    assert grown.slots == capacity(grown.rule, 1_000) > slots
    for old, new, dim in zip(before, grown.state.tensors(), (2, 2, 2, 3, 2), strict=True):
        assert torch.equal(new.narrow(dim, 0, old.shape[dim]), old)
        assert new.is_contiguous()
    assert (grown.state.pos[..., slots:] == -1).all()
    assert (grown.state.stats[..., slots:] == 0).all()


def test_no_growth_when_there_is_room():
    same = store()
    tensors = same.state.tensors()
    same.make_room(0, step=True)
    assert all(a is b for a, b in zip(tensors, same.state.tensors(), strict=True))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)])
def test_bytes(dtype, size):
    held = store(dtype=dtype)
    assert held.slots == 102
    assert held.bytes == 2 * 3 * 102 * (16 + 24) * size
    assert held.dense_bytes == 2 * 3 * 500 * (16 + 24) * size
    assert held.overhead_bytes == 2 * 3 * (102 * 4 + 102 * 4 + 4 * 4)


def test_an_empty_state():
    k, v, pos, stats, cursor = store().state.tensors()
    assert [tuple(t.shape) for t in (k, v, pos, stats, cursor)] == [
        (2, 3, 102, 16),
        (2, 3, 102, 24),
        (2, 3, 102),
        (1, 2, 3, 102),
        (2, 3, 4),
    ]
    assert (pos == -1).all()
    assert (cursor[..., LIVE] == 0).all()
    assert (cursor[..., FIRST] == -1).all()
    assert cursor.is_contiguous()


@pytest.mark.parametrize("begun", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("copied", [torch.inference_mode, torch.no_grad])
def test_a_deep_copy_can_be_changed_in_place_in_either_mode(begun, copied):
    """The copied shells find the copy, not the original, and its tensors are normal ones of their own."""
    with begun():
        original = store()
        shells = [make(original, half) for half in (0, 1)]
    with copied():
        mine = copy.deepcopy(shells)
    twin = find(mine[0])
    assert twin is not None
    assert twin is not original
    assert find(mine[1]) is twin
    assert unwrap((mine[0], mine[1]), original.layouts, "") is twin
    assert not any(t.is_inference() for t in (*twin.state.tensors(), *twin.bases))
    before = [t.clone() for t in original.state.tensors()]
    with torch.no_grad():
        for tensor in twin.state.tensors():
            tensor.add_(1)
    now = [t.nan_to_num() for t in original.state.tensors()]
    assert all(torch.equal(a, b.nan_to_num()) for a, b in zip(now, before, strict=True))


def test_memory_that_a_wider_one_replaced_stands_for_nothing() -> None:
    """Its address may be any tensor's next. `old` is held so that it is nobody's yet."""
    one = store()
    old = one.bases
    for half in (0, 1):
        one.base_of(half, 100)
    assert [sharing_storage(base) for base in old] == [None, None]
    assert [sharing_storage(base) for base in one.bases] == [one, one]
