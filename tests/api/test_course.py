"""What `kvpass.report` says of the past: bytes after each call, against those that it said then."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from models import tiny
from spelling import cache_of, with_cache

import kvpass
from kvpass.runtime.course import MOST, Course, thinned, together

PROMPT, STEPS = 80, 60


def bytes_of(cache: Any) -> int:
    """Of what slots hold, as it is now."""
    told = kvpass.report(cache).to_dict()
    return int(told["bytes"] + told["overhead_bytes"])


def level(course: list[list[int]], tokens: int) -> int:
    return [size for at, size in course if at <= tokens][-1]


def talk(model: Any, cache: Any, sizes: list[int]) -> tuple[Any, list[tuple[int, int]]]:
    """Calls of so many tokens; the cache, and what it held after each of them."""
    found, generator = [], torch.Generator().manual_seed(7)
    for size in sizes:
        ids = torch.randint(3, 90, (2, size), generator=generator)
        with torch.no_grad():
            cache = cache_of(model(ids, use_cache=True, **(with_cache(model, cache) if cache is not None else {})))
        found.append((kvpass.report(cache).to_dict()["tokens"], bytes_of(cache)))
    return cache, found


@pytest.mark.parametrize(
    ("policy", "budget"), [("h2o", 0.3), ("full", None), ("ada_snapkv", 40), ("layer_defensivekv", 48), ("mikv", 0.5)]
)
@pytest.mark.some(2)
def test_each_calls_bytes_are_those_that_were_reported_then(policy: str, budget: Any) -> None:
    model = kvpass.compile(tiny.llama(), policy, budget, inner="eager")
    cache, said = talk(model, None, [PROMPT, *([1] * STEPS), 20, *([1] * 5)])
    course = kvpass.report(cache).to_dict()["course"]
    assert {tokens: level(course, tokens) for tokens, _ in said} == dict(said)
    assert [at for at, _ in course] == sorted({at for at, _ in course})
    assert len(course) < len(said) / 2 or policy == "mikv"
    assert course[-1] == [PROMPT + STEPS + 25, said[-1][1]]


def test_copies_part_and_what_is_taken_back_goes() -> None:
    model = kvpass.compile(tiny.llama(), "full", None, inner="eager")
    cache, said = talk(model, None, [PROMPT, 30])
    fork = copy.deepcopy(cache)
    talk(model, fork, [40])
    cache.crop(-26)
    cache, more = talk(model, cache, [1, 1])
    course, other = (kvpass.report(one).to_dict()["course"] for one in (cache, fork))
    assert [at for at, _ in course if at > PROMPT] == sorted({at for at, _ in course if PROMPT < at <= PROMPT + 6})
    assert level(course, PROMPT) == level(other, PROMPT) == said[0][1]
    assert course[-1] == [PROMPT + 6, more[-1][1]]
    assert other[-1][0] == PROMPT + 70
    assert level(other, PROMPT + 30) == said[1][1]


def test_a_long_record_is_bounded_and_understates_nothing() -> None:
    changes = tuple((at, (at * 7919) % 1000) for at in range(0, 3000, 3))
    kept: tuple[tuple[int, int], ...] = ()
    for one in changes:
        kept = thinned((*kept, one))
        assert len(kept) <= MOST
    assert kept[-1] == changes[-1]
    ends = [at for at, _ in kept[1:]] + [3000]
    for (start, size), end in zip(kept, ends, strict=True):
        assert size >= max(held for at, held in changes if start <= at < end)


def test_a_step_that_changes_nothing_notes_nothing() -> None:
    state = SimpleNamespace(pos=torch.zeros(1, 2, 8))
    store = cast(Any, SimpleNamespace(state=state, rule=SimpleNamespace(demotes=False), tokens=5, bytes=100))
    store.overhead_bytes = 11
    first = Course().after([store])
    store.tokens = 6
    assert first.after([store]) is first
    state.pos = torch.zeros(1, 2, 9)
    assert first.after([store]).changes == ((5, 111), (6, 111))


def test_graphs_of_one_cache_are_added_up() -> None:
    one, other = Course((), ((4, 10), (8, 20))), Course((), ((4, 1), (6, 2), (9, 5)))
    assert together([one, other], (9, 30)) == [(4, 11), (6, 12), (8, 22), (9, 30)]
