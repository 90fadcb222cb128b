"""Attention Matching by hand: the vector of shared/policies-2.md S2, and what least squares alone cannot take."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kvpass.kernels.compact_slots import compact_slots
from kvpass.kernels.exits.refit import Refit, matched, nearest_solution, refitted
from kvpass.kernels.exits.refit_slots import refit_slots
from kvpass.kernels.rank.scorers.seen import Seen
from kvpass.kernels.rank.scorers.window import rms
from kvpass.kernels.rank.window_rows import window_rows
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.bias import BIAS
from kvpass.kernels.slots.state import State
from torch import Tensor

INF = float("inf")
KEYS, VALUES, QUERIES = [[1.0], [0.0], [-1.0]], [[10.0], [0.0], [-10.0]], [1.0, 2.0]


def close(got: Tensor, want: Any, atol: float = 2e-5) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), rtol=2e-5, atol=atol)


def fitted(
    keys: list[list[float]],
    values: list[list[float]],
    score: list[float],
    kept: list[int],
    queries: list[float],
    refit: Refit,
    dtype: torch.dtype = torch.float32,
) -> State:
    """One head of a call whose last tokens have these queries, all of which see every key."""
    rule = Rule(refit, stats=("sum",), slots=len(kept))
    k, v = (torch.tensor(x, dtype=dtype)[None, None] for x in (keys, values))
    state = State.empty(rule, k, B=1, H=1, C=len(kept) + 2, D=k.shape[3], V=v.shape[3])
    for name in ("k", "v"):
        state[name].fill_(float("nan"))  # what nobody wrote
    cursor = torch.tensor([[[len(kept), len(kept), len(keys), 0]]], dtype=torch.int32)
    idx, stats = torch.tensor([[kept]], dtype=torch.int32), torch.zeros(1, 1, 1, len(keys))
    compact_slots([k, v, None, stats, None], idx, cursor, state.tensors(), rule.encode())
    q = torch.zeros(1, 1, len(keys), k.shape[3], dtype=dtype)
    q[0, 0, len(keys) - len(queries) :, 0] = torch.tensor(queries, dtype=dtype)
    valid = torch.ones(1, len(keys), dtype=torch.bool)
    scores = torch.tensor([[score]])
    refit_slots(q, k, v, None, None, valid, 1.0, "", scores, idx, state.tensors(), rule.encode())
    return state


def held(state: State) -> tuple[Tensor, Tensor]:
    live = int(state.cursor[0, 0, 0])
    return state[BIAS][0, 0, :live], state.v[0, 0, :live]


def test_the_paper_in_small() -> None:
    """S2: B = [.950213, 1.503215], biases [-.051069, .407606], values [11.047914, -3.347590]; outputs are exact."""
    state = fitted(KEYS, VALUES, [2.0, 1.0, 0.0], [0, 1], QUERIES, Refit(2))
    bias, values = held(state)
    close(bias, [-0.051069, 0.407606], atol=1e-6)
    close(values, [[11.047914], [-3.347590]])
    logits = torch.tensor(QUERIES)[:, None] @ state.k[0, 0, :2].mT + bias
    close(logits.softmax(-1), [[0.632121, 0.367879], [0.823657, 0.176343]])
    close(logits.softmax(-1) @ values, [[5.752104], [8.509371]])


def test_the_score() -> None:
    """S2: rms = [.772629, .191903, .064643]."""
    rule = Rule(queries=2, scorer="rms", reads=("rows",))
    k, q = torch.tensor(KEYS)[None, None], torch.tensor([0.0, *QUERIES])[None, None, :, None]
    rows = window_rows(q, k, None, None, torch.ones(1, 3, dtype=torch.bool), 1.0, "", rule.encode())
    here = torch.arange(3).expand(1, 1, 3)
    end = torch.full((1, 1, 1), 3)
    seen = Seen(here, here >= 0, end, end - 3, end, end, 2, 0, None, None, rows, {})
    close(rms(seen)[0, 0], [0.772629, 0.191903, 0.064643])


def test_protected_slots_are_as_they_were() -> None:
    """A sink and a newest token around the same span: the span is fitted by itself, they keep what they had."""
    keys, values = [[7.0], *KEYS, [5.0]], [[1.0], *VALUES, [2.0]]
    state = fitted(keys, values, [INF, 2.0, 1.0, 0.0, INF], [0, 1, 2, 4], QUERIES, Refit(2))
    bias, values_now = held(state)
    close(bias, [0.0, -0.051069, 0.407606, 0.0], atol=1e-6)
    close(values_now, [[1.0], [11.047914], [-3.347590], [2.0]])


def test_tokens_of_nobody_have_no_say() -> None:
    keys, values = [[3.0], *KEYS], [[1000.0], *VALUES]
    bias, got = held(fitted(keys, values, [-INF, 2.0, 1.0, 0.0], [1, 2], QUERIES, Refit(2)))
    close(bias, [-0.051069, 0.407606], atol=1e-6)
    close(got, [[11.047914], [-3.347590]])


def test_nothing_goes() -> None:
    """A budget that holds all: bit for bit what was there."""
    state = fitted(KEYS, VALUES, [2.0, 1.0, 0.0], [0, 1, 2], QUERIES, Refit(2))
    bias, values = held(state)
    assert bias.tolist() == [0.0] * 3
    assert values.tolist() == VALUES


def test_equal_keys() -> None:
    """Three equal keys of which two stay: each stands for one and a half, and values change alike."""
    for count in (1, 2, 3):  # one query says as much as three
        bias, values = held(
            fitted([[1.0]] * 3, [[0.0], [3.0], [6.0]], [2.0, 1.0, 0.0], [0, 1], [1.0] * count, Refit(3))
        )
        close(bias, [math.log(1.5)] * 2)
        close(values, [[1.5], [4.5]])


def test_bounds() -> None:
    """One of a hundred equal keys would have to weigh a hundred: e^3 is the most. Steps find the best within bounds."""
    bias, values = held(fitted([[0.0]] * 100, [[1.0]] * 100, [1.0, *[0.0] * 99], [0], [0.0], Refit(1)))
    assert bias.tolist() == [3.0]
    close(values, [[1.0]])
    part = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    wanted = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    low, high = torch.full((2,), 0.05, dtype=torch.float64), torch.full((2,), 20.0, dtype=torch.float64)
    close(matched(part, wanted, (low, high), 0, 0.0)[:, 0], [1.0, 0.05], atol=1e-4)
    after = matched(part, wanted, (low, high), 50, 0.0)[:, 0]
    close(after, [0.975, 0.05], atol=1e-4)  # by hand: the first is (1 - .05 + 1) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_logits_and_dead_slots(dtype: torch.dtype) -> None:
    """A slot that no query weighs at all, and queries a thousand away from the others: all finite."""
    keys = [[1000.0], [-1000.0], [999.0], [0.0]]
    state = fitted(keys, [[1.0], [5.0], [2.0], [3.0]], [3.0, 2.0, 1.0, 0.0], [0, 1], [1.0, 2.0], Refit(2), dtype)
    bias, values = held(state)
    assert torch.isfinite(bias).all()
    assert torch.isfinite(values).all()
    assert bias[1] == 0.0
    assert values[1] == 5.0
    assert values.dtype == dtype


def test_no_query_sees_what_stays() -> None:
    refit = Refit(2)
    hidden = torch.tensor([[-INF, 0.0, 0.0], [-INF, 1.0, 0.0]])
    assert refitted(hidden, torch.ones(3, 1), torch.tensor([0]), torch.zeros(1), refit) is None


@pytest.mark.parametrize("shape", [(40, 7), (5, 7)], ids=["tall", "wide"])
def test_nearest_solutions(shape: tuple[int, int]) -> None:
    """Where it is open, nearest to the start: numpy's pseudo-inverse of the difference. A ridge pulls there."""
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(*shape, generator=g, dtype=torch.float64)
    wanted, start = (torch.randn(n, 3, generator=g, dtype=torch.float64) for n in shape)
    got = nearest_solution(matrix, wanted, start, 0.0)
    want = start + torch.linalg.pinv(matrix) @ (wanted - matrix @ start)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    pulled = nearest_solution(matrix, wanted, start, 1e9)
    torch.testing.assert_close(pulled, start, rtol=1e-5, atol=1e-5)
    nothing = nearest_solution(torch.zeros_like(matrix), wanted, start, 0.0)
    assert torch.equal(nothing, start)
