"""Places in a memory: whether two share an element, against all elements written out; and what a memory stands for."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpass.runtime.memory import overlapping, place_of, stand, stands

CUTS = st.one_of(st.integers(0, 2), st.tuples(st.integers(0, 2), st.integers(1, 3)).map(lambda p: slice(p[0], sum(p))))


class Standin:
    """In the place of a store."""


def elements(tensor: torch.Tensor) -> set[int]:
    """Offsets of all its elements."""
    steps = [range(size) for size in tensor.shape]
    return {
        int(tensor.storage_offset()) + sum(at * step for at, step in zip(places, tensor.stride(), strict=True))
        for places in itertools.product(*steps)
    }


@given(st.lists(CUTS, max_size=4), st.lists(CUTS, max_size=4), st.booleans())
@settings(max_examples=300, deadline=None)
def test_overlap_of_equal_strides_is_exact(one: list[Any], other: list[Any], turned: bool) -> None:
    stack = torch.zeros(3, 3, 3, 4).permute(0, 2, 1, 3) if turned else torch.zeros(3, 3, 3, 4)
    a, b = stack[tuple(one)], stack[tuple(other)]
    found = place_of(a).overlaps(place_of(b))
    assert found == place_of(b).overlaps(place_of(a))
    shared = bool(elements(a) & elements(b))
    assert found == shared if a.stride() == b.stride() else found or not shared


def test_a_path_is_a_place() -> None:
    stack = torch.zeros(3, 2, 4, 5)
    assert place_of(stack, (1, -1)) == place_of(stack[1, 1]) == place_of(stack.view(6, 4, 5), (3,))
    assert place_of(stack, (1, 0)) != place_of(stack[1, 1])
    assert place_of(stack[0, 0]) != place_of(stack[0, 0].view(torch.int32))


def test_stands_for_what_was_last_said() -> None:
    stack, first, second = torch.zeros(2, 4, 5), Standin(), Standin()
    stand(stack[0], (), first, 0)  # type: ignore[arg-type]  # no store is needed
    stand(stack, (1,), second, 1)  # type: ignore[arg-type]
    assert stands(stack, (0,)) == (first, 0)
    assert stands(stack[1]) == (second, 1)
    assert stands(stack) is None
    assert {id(one) for one, _ in overlapping(stack)} == {id(first), id(second)}
    stand(stack[:, :2], (), second, 0)  # type: ignore[arg-type]
    assert stands(stack[0]) is None
    assert stands(stack[:, :2]) == (second, 0)


def test_copies_stand_for_copies() -> None:
    stack, store = torch.zeros(2, 4, 5), Standin()
    stand(stack[0], (), store, 0)  # type: ignore[arg-type]
    other = copy.deepcopy(stack)
    found = stands(other[0])
    assert found is not None
    assert found[0] is not store
    assert stands(other.clone()[0]) is None
    other.data = torch.zeros(2, 4, 5)
    assert stands(other[0]) is None
