"""Buffers that the first call makes and returns, however they are made and however later calls write into them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.hosts import DIM, HEADS, LAYERS, ROOM, Decoder, Pair
from torch import Tensor

import kvpass
from kvpass.errors import ShellDataError

GRAPHS, BUDGET, SINKS = 4, 12, 4


def by_slice(buffer: Tensor, new: Tensor, start: int) -> None:
    buffer[:, :, start : start + new.shape[2]] = new


def by_narrow(buffer: Tensor, new: Tensor, start: int) -> None:
    buffer.narrow(2, start, new.shape[2]).copy_(new)


def by_copy(buffer: Tensor, new: Tensor, start: int) -> None:
    buffer[:, :, start : start + new.shape[2], :].copy_(new)


def by_index(buffer: Tensor, new: Tensor, start: int) -> None:
    buffer[:, :, torch.arange(start, start + new.shape[2])] = new


def by_index_copy(buffer: Tensor, new: Tensor, start: int) -> None:
    buffer.index_copy_(2, torch.arange(start, start + new.shape[2]), new)


def zeros(k: Tensor, v: Tensor) -> Pair:
    return k.new_zeros(1, HEADS, ROOM, DIM), torch.zeros(1, HEADS, ROOM, DIM)


def zeros_like(k: Tensor, v: Tensor) -> Pair:
    first = torch.zeros(1, HEADS, ROOM, DIM)
    return first, torch.zeros_like(first)


def ones_like(k: Tensor, v: Tensor) -> Pair:
    first = torch.zeros(1, HEADS, ROOM, DIM)
    return torch.ones_like(first), first


WRITES = [by_slice, by_narrow, by_copy, by_index, by_index_copy]


class Makes(Decoder):
    """Makes its buffers in the first call and returns them."""

    def __init__(self, make: Callable[[Tensor, Tensor], Pair], write: Callable[[Tensor, Tensor, int], None]) -> None:
        super().__init__()
        self.make, self.write = make, write

    def forward(self, ids: Tensor, start: int, pairs: list[Pair] | None = None) -> tuple[Tensor, list[Pair]]:
        made: list[Pair] = []
        shown = torch.ones(ROOM, ROOM, dtype=torch.bool).tril()[start : start + ids.shape[1]]

        def cached(layer: int, k: Tensor, v: Tensor) -> Pair:
            made.append(self.make(k, v) if pairs is None else pairs[layer])
            for buffer, new in zip(made[-1], (k, v), strict=True):
                self.write(buffer, new, start)
            return made[-1]

        return self.run(ids, start, cached, shown), made


def tokens(length: int, seed: int) -> Tensor:
    return torch.randint(0, 50, (1, length), generator=torch.Generator().manual_seed(seed))


def converse(model: Any, prompt: int, steps: int) -> tuple[Tensor, list[Pair]]:
    start, pairs, logits = 0, None, []
    with torch.no_grad():
        for at in range(steps + 1):
            ids = tokens(prompt if at == 0 else 1, at)
            out, pairs = model(ids, start, pairs) if pairs is not None else model(ids, start)
            start += ids.shape[1]
            logits.append(out[:, -1])
    assert pairs is not None
    return torch.stack(logits), pairs


CASES = [*((zeros, write) for write in WRITES), (zeros_like, by_slice), (ones_like, by_narrow)]
NAMES = [f"{make.__name__}-{write.__name__}" for make, write in CASES]


@pytest.mark.parametrize(("make", "write"), CASES, ids=NAMES)
@pytest.mark.some(4)
def test_the_models_numbers_in_few_graphs(make: Any, write: Any) -> None:
    compiled = kvpass.compile(Makes(make, write).eval(), "full", inner="eager")
    for prompt, steps in ((30, 40), (37, 5)):
        expected, _ = converse(Makes(make, write).eval(), prompt, steps)
        torch.testing.assert_close(converse(compiled, prompt, steps)[0], expected, rtol=1e-4, atol=1e-5)
    assert len(compiled.kvpass.graphs) <= GRAPHS
    assert all(len(record.table.sites) == LAYERS for record in compiled.kvpass.graphs)


@pytest.mark.parametrize(("make", "write"), CASES, ids=NAMES)
def test_keeps_what_the_policy_says_and_no_buffer(make: Any, write: Any) -> None:
    compiled = kvpass.compile(Makes(make, write).eval(), "streaming_llm", BUDGET, inner="eager")
    _, pairs = converse(compiled, 30, 5)
    kept = [*range(SINKS), *range(35 - BUDGET + SINKS, 35)]
    for layer in kvpass.inspect(pairs).layers:
        assert all(sorted(head.tolist()) == kept for row in layer.positions for head in row)
    data = kvpass.report(pairs).to_dict()
    assert data["slot_bytes"] == LAYERS * 2 * HEADS * (BUDGET + 1) * DIM * 4
    assert data["caller_bytes"] == 0
    rows = 1 + HEADS + ROOM + DIM - 3
    assert all(t.untyped_storage().nbytes() == 4 * rows for pair in pairs for t in pair)


def test_shells_speak_and_are_copied() -> None:
    compiled = kvpass.compile(Makes(zeros, by_slice).eval(), "full", inner="eager")
    _, pairs = converse(compiled, 30, 2)
    with pytest.raises(ShellDataError):
        pairs[0][0].sum()
    with pytest.raises(ShellDataError):
        pairs[0][0][:, :, 0].add_(1)
    other = copy.deepcopy(pairs)
    with torch.no_grad():
        first, pairs = compiled(tokens(1, 3), 32, pairs)
        second, other = compiled(tokens(1, 3), 32, other)
        again, _ = compiled(tokens(1, 4), 33, other)
        assert torch.equal(compiled(tokens(1, 4), 33, pairs)[0], again)
    assert torch.equal(first, second)


def test_begun_again_in_the_buffers_that_came_back() -> None:
    compiled = kvpass.compile(Makes(zeros, by_slice).eval(), "full", inner="eager")
    _, pairs = converse(compiled, 30, 2)
    original = Makes(zeros, by_slice).eval()
    with torch.no_grad():
        _, ours = original(tokens(20, 9), 0)
        expected, _ = original(tokens(1, 8), 20, ours)
        _, theirs = compiled(tokens(20, 9), 0, pairs)
        found, _ = compiled(tokens(1, 8), 20, theirs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
