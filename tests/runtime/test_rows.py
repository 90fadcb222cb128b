"""Rows of compressed caches in a host that holds plain tensors: each goes on as it would have where it came from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import plain
from models.kinds import KINDS
from torch import Tensor

import kvpass
from kvpass.errors import ShellDataError, StaleCacheError
from kvpass.runtime.shell import find

pytestmark = pytest.mark.usefixtures("one_trace")

ROWS = [2, 0, 2, 1]
Change = Callable[[Tensor], Tensor]
WAYS: dict[str, tuple[list[int], Change]] = {
    "index": (ROWS, lambda t: t[torch.tensor(ROWS)]),
    "index and dots": (ROWS, lambda t: t[torch.tensor(ROWS), ...]),
    "list": (ROWS, lambda t: t[ROWS]),
    "flags": ([0, 2], lambda t: t[torch.tensor([True, False, True]), :, :, :]),
    "index_select": (ROWS, lambda t: torch.index_select(t, 0, torch.tensor(ROWS))),
    "contiguous": (ROWS, lambda t: t.index_select(0, torch.tensor(ROWS)).contiguous()),
    "repeat_interleave": ([0, 0, 1, 1, 2, 2], lambda t: t.repeat_interleave(2, dim=0)),
    "repeat": ([0, 1, 2, 0, 1, 2], lambda t: t.repeat(2, 1, 1, 1)),
    "tile": ([0, 1, 2, 0, 1, 2], lambda t: t.tile(2, 1, 1, 1)),
    "slice": ([1, 2], lambda t: t[1:]),
    "narrow": ([1], lambda t: t.narrow(0, 1, 1)),
    "split": ([2], lambda t: t.split(1)[2]),
    "chunk": ([0, 1], lambda t: t.chunk(2)[0]),
    "one row expanded": ([1, 1, 1], lambda t: t[1:2].expand(3, -1, -1, -1)),
    "picked twice": ([1, 2], lambda t: t[ROWS].index_select(0, torch.tensor([3, 0]))),
}


def compiled(kind: str, **more: Any) -> Any:
    policy, budget = KINDS[kind]
    return kvpass.compile(plain.one(plain.Decoder), policy, budget, inner="eager", **more)


def fed(model: Any, cache: Any, ids: Tensor) -> tuple[Tensor, Any]:
    with torch.no_grad():
        return model(ids, cache)


def begun(model: Any, length: int = 60, rows: int = 3) -> Any:
    cache = fed(model, None, plain.tokens(rows, length))[1]
    return fed(model, cache, plain.tokens(rows, 1, seed=1))[1]


def changed(cache: Any, change: Change) -> Any:
    return tuple((change(k), change(v)) for k, v in cache)


def gone_on(model: Any, cache: Any, rows: list[int], of: int = 3) -> Tensor:
    """Logits of three steps, a call of five tokens, and a step: each row's tokens are its own."""
    said = []
    for seed, length in enumerate((1, 1, 1, 5, 1)):
        logits, cache = fed(model, cache, plain.tokens(of, length, seed=10 + seed)[rows])
        said.append(logits)
    return torch.cat(said, 1)


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_go_on_as_they_were(kind: str) -> None:
    model = compiled(kind)
    cache = begun(model)
    picked = changed(cache, WAYS["index"][1])
    got = gone_on(model, picked, ROWS)
    same(got, gone_on(model, cache, [0, 1, 2])[ROWS])  # the cache that they were picked from is good too


@pytest.mark.parametrize("kind", ["even", "ragged"])
@pytest.mark.parametrize("way", WAYS)
def test_however_the_host_says_it(kind: str, way: str) -> None:
    model, (rows, change) = compiled(kind), WAYS[way]
    cache = begun(model)
    picked = changed(cache, change)
    assert [len(find(k).state.cursor) for k, _ in picked] == [len(rows)] * 2
    assert [k.shape for k, _ in picked] == [(len(rows), 2, 61, 8)] * 2
    for (k, v), (old, _) in zip(picked, cache, strict=True):
        assert find(k) is find(v) is not find(old)
        assert torch.equal(find(k).state.pos, find(old).state.pos[rows])
        assert torch.equal(find(k).state.cursor, find(old).state.cursor[rows])
    step = plain.tokens(3, 1, seed=4)
    same(fed(model, picked, step[rows])[0], fed(model, cache, step)[0][rows])


def test_keys_of_all_layers_before_their_values() -> None:
    """And rows one by one: each key finds its value again."""
    model = compiled("even")
    cache = begun(model)
    keys = [k.split(1) for k, _ in cache]
    values = [v.split(1) for _, v in cache]
    step = plain.tokens(3, 1, seed=4)
    want = fed(model, cache, step)[0]
    for row in (2, 0, 1):
        alone = tuple((k[row], v[row]) for k, v in zip(keys, values, strict=True))
        same(fed(model, alone, step[row : row + 1])[0], want[row : row + 1])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.index_select(2, torch.tensor([0, 1])), "along its first axis"),
        (lambda t: t[:, [1, 0]], "whole sequences"),
        (lambda t: t[[0, 1], :, :5], "whole sequences"),
        (lambda t: t.repeat(1, 2, 1, 1), "whole sequences"),
        (lambda t: t.repeat_interleave(2), "whole sequences"),
        (lambda t: torch.cat([t, t]), "joined by hand"),
        (lambda t: t.flip(0), "as data"),
    ],
)
def test_what_picks_no_rows(change: Change, what: str) -> None:
    model = compiled("even")
    cache = begun(model)
    with pytest.raises(ShellDataError) as caught:
        changed(cache, change)
    assert what in str(caught.value)
    fed(model, cache, plain.tokens(3, 1))


def test_what_changes_nothing_is_answered() -> None:
    (k, _), _ = begun(compiled("even"))
    for answered in (k.to("cpu"), k.to(torch.float32), k.cpu(), k.float(), k.contiguous(), k.to(k.device)):
        assert answered is k
    with pytest.raises(ShellDataError):
        k.to(torch.float16)


def test_picked_and_shortened() -> None:
    """Nothing is evicted: tokens are taken back of a picked row, in either order."""
    model = kvpass.compile(plain.one(plain.Decoder), "full", inner="eager")
    cache = begun(model)
    shorter: list[Change] = [lambda t: t[ROWS][:, :, :-4], lambda t: t[:, :, :-4][ROWS], lambda t: t[2:, :, :-4]]
    with torch.no_grad():
        want = plain.one(plain.Decoder)(torch.cat([plain.tokens(3, 60)[:, :57], plain.tokens(3, 1, seed=4)], 1))[0]
    for change, rows in zip(shorter, (ROWS, ROWS, [2]), strict=True):
        got = fed(model, changed(cache, change), plain.tokens(3, 1, seed=4)[rows])[0]
        same(got, want[rows, -1:])


def test_a_batch_that_does_not_fit_is_told() -> None:
    model = compiled("even")
    cache = begun(model)
    mixed = tuple((k[:2], v[1:]) for k, v in cache)
    with pytest.raises((StaleCacheError, ShellDataError)):
        fed(model, mixed, plain.tokens(2, 1))
    same(gone_on(model, copy.deepcopy(cache), [0, 1, 2]), gone_on(model, cache, [0, 1, 2]))
