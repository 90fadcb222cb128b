"""Vectors that were worked out by hand (shared/policies.md, section 7.2), against the library's functions."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from kvpass.kernels.budget import budget
from kvpass.kernels.prefill_attend import prefill_attend
from kvpass.kernels.rank.allocate import head_counts
from kvpass.kernels.rank.ranking import slot_scores
from kvpass.kernels.rank.scorers.lag import lag
from kvpass.kernels.rank.scorers.seen import Seen
from kvpass.kernels.rank.scorers.window import cake, defensive, finch, window_mean
from kvpass.kernels.rank.scores import score_slots
from kvpass.kernels.rank.smooth import pooled, smoothed
from kvpass.kernels.rank.weights import value_weights
from kvpass.kernels.rule import Rule
from kvpass.kernels.select_slots import select_slots
from kvpass.kernels.slots.cursor import FIRST, LIVE


def close(ours: torch.Tensor, expected: list[float], digits: float = 1e-4) -> None:
    torch.testing.assert_close(ours.flatten(), torch.tensor(expected, dtype=torch.float32), rtol=digits, atol=digits)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("avg", [0.1, 0.3, 0.283333, 0.233333, 0.033333]), ("max", [0.2, 0.6, 0.6, 0.6, 0.05])],
)
def test_pool(kind: str, expected: list[float]) -> None:
    scores, pos = torch.tensor([[[0.1, 0.2, 0.6, 0.05, 0.05]]]), torch.arange(5)[None, None]
    there, end = torch.ones(1, 1, 5, dtype=torch.bool), torch.tensor([[[5]]])
    close(pooled(scores, pos, there, end, Rule(pool=kind, pool_size=3)), expected)
    close(smoothed(scores, 3, kind), expected)


@pytest.mark.parametrize(
    ("slots", "layers", "first", "last"),
    [(1024, 32, 1935, 49), (64, 4, 63, 1), (72, 3, 78, 2)],
)
def test_pyramid(slots: int, layers: int, first: int, last: int) -> None:
    """R6's ends, the window of 32 on top, whatever the length; equal steps in between, and no more than even budgets
    together (R6 rounds its steps down, and so its sum up)."""
    rules = [Rule(queries=32, slots=slots, beta=20, layer=layer, layers=layers) for layer in range(layers)]
    for seen in (40, slots, 8 * slots):
        budgets = [budget(rule, seen) - 32 for rule in rules]
        assert (budgets[0], budgets[-1]) == (first, last)
        steps = {a - b for a, b in pairwise(budgets)}
        assert max(steps) - min(steps) <= 1
        assert layers * (slots - 32) - layers < sum(budgets) <= layers * (slots - 32)


def test_pyramid_without_a_base_is_even() -> None:
    """Where beta leaves the last layer nothing."""
    assert {budget(Rule(queries=32, slots=48, beta=20, layer=at, layers=4), 60) for at in range(4)} == {48}


@pytest.mark.parametrize("safe", [(1, 5), (1, 2)])
def test_flat_heads_with_safeguard(safe: tuple[int, int]) -> None:
    """R5."""
    scores = torch.tensor([[[0.9, 0.8, 0.7, 0.1], [0.3, 0.2, 0.15, 0.05]]])
    rule = Rule(ragged=True, safe_num=safe[0], safe_den=safe[1])
    size = torch.full((1, 2, 1), 2)
    assert head_counts(scores, torch.ones_like(scores, dtype=torch.bool), size, rule).tolist() == [[3, 1]]


PROBABILITIES = [[1], [0.85, 0.15], [0.5, 0.15, 0.35], [0.35, 0.15, 0.3, 0.2], [0.25, 0.15, 0.2, 0.2, 0.2]]


def attended(rule: Rule, probabilities: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """(statistics, scores, kept positions) of a call whose attention has these rows: the keys are the unit vectors."""
    size = len(probabilities)
    q = torch.zeros(1, 1, size, size)
    for i, row in enumerate(probabilities):
        q[0, 0, i, : len(row)] = torch.tensor(row).log()
    k = torch.eye(size)[None, None]
    text = rule.encode()
    out, stats, valid = prefill_attend(q, k, k, None, None, 1.0, "causal", text)
    for i, row in enumerate(probabilities):
        close(out[0, 0, i, : len(row)], row, 1e-6)
    cursor = torch.tensor([[[0, 0, 0, -1]]], dtype=torch.int32)
    score, stats, cursor = score_slots(stats, None, None, valid, cursor, 0, text)
    assert int(cursor[0, 0, FIRST]) == 0
    kept = select_slots(score, cursor, size)[0, 0]
    assert int(cursor[0, 0, LIVE]) == int((kept >= 0).sum())
    return stats[:, 0, 0], score[0, 0], kept[kept >= 0].tolist()


def test_h2o() -> None:
    rule = Rule(stats=("sum",), queries=-1, decode="add", score="sum", recent=1, slots=4)
    stats, _, kept = attended(rule, PROBABILITIES)
    close(stats[0], [2.95, 0.6, 0.85, 0.4, 0.2])
    assert kept == [0, 1, 2, 4]


def test_roco() -> None:
    stats = ("sum", "sumsq", "count")
    rule = Rule(stats=stats, queries=-1, decode="add", score="mean", recent=1, slots=4, scope_num=3, scope_den=10)
    (sums, squares, count), score, kept = attended(rule, PROBABILITIES)
    close(count, [5, 4, 3, 2, 1])
    mean = sums / count
    close(mean, [0.59, 0.15, 0.2833, 0.2, 0.2])
    close((squares / count - mean**2).clamp(min=0).sqrt(), [0.2888, 0, 0.0624, 0, 0], 5e-4)
    assert score.argmin() == 1
    assert score[4] == torch.inf
    assert kept == [0, 2, 3, 4]


def test_tova() -> None:
    rule = Rule(stats=("sum",), queries=1, heads="all", carry=False, decode="replace", score="sum", slots=4)
    stats, _, kept = attended(rule, PROBABILITIES)
    close(stats[0], PROBABILITIES[-1])
    assert kept == [0, 2, 3, 4]


def test_minor_verdicts() -> None:
    """Queries that give a key less than an even share: [0, 4, 0, 1, 0] of those that see it. The last row's equal
    fifths are lifted above an even share that float32 might miss."""
    rule = Rule(stats=("count", "important"), queries=-1, decode="add", score="important", slots=4)
    rows = [*PROBABILITIES[:-1], [0.25 - 3e-6, 0.15, 0.2 + 1e-6, 0.2 + 1e-6, 0.2 + 1e-6]]
    (count, important), score, kept = attended(rule, rows)
    close(count - important, [0, 4, 0, 1, 0])
    close(score, [1, 0, 1, 0.5, 1])
    assert kept == [0, 2, 3, 4]


def seen(**given: Any) -> Seen:
    """What a scorer sees of 4 keys before a window of 3."""
    pos = torch.arange(4, dtype=torch.int32)[None, None]
    one = torch.ones(1, 1, 1, dtype=torch.int64)
    there = torch.ones(1, 1, 4, dtype=torch.bool)
    plain = {"pos": pos, "candidate": there, "end": 7 * one, "first": 0 * one, "seen": 7 * one, "budget": 5 * one}
    none = dict.fromkeys(("k", "v", "rows"))
    return Seen(**{**plain, **none, "window": 3, "seed": 0, "statistics": {}, **given})


WINDOW = torch.tensor([[0.05, 0.05, 0.8, 0.1], [0.3, 0.3, 0.1, 0.3], [0.3, 0.3, 0.1, 0.3]])[None, None, None]


def test_window_rows() -> None:
    here = seen(rows=WINDOW)
    close(window_mean(WINDOW, here), [0.2167, 0.2167, 0.3333, 0.2333])
    close(defensive(here, pool=1, nucleus=0.0), [0.425, 0.425, 0.8, 0.425])
    close(cake(here, pool=1), [4.383, 4.383, 33.0, 2.9], 5e-4)
    close(finch(here), [4 * 0.21667, 4 * 0.21667, 4 * 0.33333, 4 * 0.23333])


def test_nucleus() -> None:
    """Shares .333, .233, .217, .217: below .6 reach two, of which the budget has room for two beside the window."""
    lifted = defensive(seen(rows=WINDOW), pool=1, nucleus=0.6) > 1
    assert lifted.flatten().tolist() == [False, False, True, True]
    lifted = defensive(seen(rows=WINDOW, budget=torch.full((1, 1, 1), 4)), pool=1, nucleus=0.6) > 1
    assert lifted.flatten().tolist() == [False, False, True, False]


def test_lag() -> None:
    block, reference = [[0.0, 0], [1, 1], [2, 0]], [[0.0, 0], [2, 2], [1, 1]]
    keys = torch.tensor(block + reference)[None, None]
    pos = torch.arange(6, dtype=torch.int32)[None, None]
    here = seen(pos=pos, candidate=torch.ones(1, 1, 6, dtype=torch.bool), k=keys, v=keys)
    close(lag(here, sinks=0, block=3, cross=True), [0.2483, 0.2483, 0.5035, 1 + 3 / 6, 1 + 4 / 6, 1 + 5 / 6])
    close(lag(here, sinks=0, block=3), [0, 1 / 3, 2 / 3, 1 + 3 / 6, 1 + 4 / 6, 1 + 5 / 6])


def test_retention() -> None:
    """TRIM-KV: log-retention times age, t = 100."""
    rule = Rule(stats=("scored",), score="scored", scorer="knorm", decay=True, slots=2)
    held = torch.tensor([[[[-0.01, -0.001, -0.1]]]])
    close(slot_scores(held, torch.tensor([[[0, 50, 98]]]), rule, 100), [-1, -0.05, -0.2])


def test_value_weights() -> None:
    """v = (3, -4) and (1, 0): L1, L2, and through output projections of two query heads, the identity and twice it."""
    v = torch.tensor([[[[3.0, -4.0]], [[1.0, 0.0]]]])
    wo = torch.cat([torch.eye(2), 2 * torch.eye(2), torch.eye(2), 2 * torch.eye(2)], 1)
    close(value_weights("l1", v, None), [7, 1])
    close(value_weights("l2", v, None), [5, 1])
    close(value_weights("vo_l1", v, wo), [10.5, 1.5])
    close(value_weights("vo_l1_share", v, wo), [0.875, 0.125])
