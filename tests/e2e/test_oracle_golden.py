"""The oracle itself: against the golden vectors of shared/policies.md 7.2, against masks, and against wrong answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import tiny
from oracle.choice import Choice, objection
from oracle.hf import Oracle
from oracle.policies import EVICTING, H2O, Budget, Memory, RoCo, Row, SnapKV, Tova

A = np.array(
    [
        [1, 0, 0, 0, 0],
        [0.85, 0.15, 0, 0, 0],
        [0.5, 0.15, 0.35, 0, 0],
        [0.35, 0.15, 0.3, 0.2, 0],
        [0.25, 0.15, 0.2, 0.2, 0.2],
    ]
)
RTOL = 2.0**-14


def row(length: int) -> Row:
    return Row(start=0, valid=np.ones(length, dtype=bool), before=0, seen=length)


def watched(policy: H2O | RoCo | Tova, one_by_one: bool) -> Memory:
    """What the policy remembers of A, seen as one call or as five."""
    memory = Memory()
    if not one_by_one:
        memory.grow(5)
        policy.observe(memory, A, A > 0, row(5), np.arange(5))
        return memory
    for t in range(5):
        memory.grow(t + 1)
        now = Row(start=t, valid=np.ones(1, dtype=bool), before=t, seen=t + 1)
        policy.observe(memory, A[t : t + 1, : t + 1], A[t : t + 1, : t + 1] > 0, now, np.arange(t + 1))
    return memory


def choice(score: list[float], variance: list[float] | None = None, **overrides: object) -> Choice:
    n = len(score)
    spread = np.array(variance if variance is not None else [0.0] * n)
    protected = np.arange(n) == n - 1
    values = {
        "untouchable": 0,
        "keep": n - 1,
        "queries": 5,
        "power": spread,
        "protected": protected,
        **overrides,
    }
    return Choice(positions=np.arange(n), score=np.array(score), variance=spread, **values)  # type: ignore[arg-type]


def evicted(c: Choice) -> list[int]:
    return sorted(set(c.positions) - set(c.kept()))


@pytest.mark.parametrize("one_by_one", [False, True])
def test_h2o_sums(one_by_one: bool) -> None:
    memory = watched(H2O(), one_by_one)
    np.testing.assert_allclose(H2O().score(memory), [2.95, 0.6, 0.85, 0.4, 0.2])
    assert evicted(choice(list(memory.sum))) == [3]


@pytest.mark.parametrize("one_by_one", [False, True])
def test_roco_mean_and_deviation(one_by_one: bool) -> None:
    memory = watched(RoCo(), one_by_one)
    np.testing.assert_array_equal(memory.count, [5, 4, 3, 2, 1])
    np.testing.assert_allclose(memory.mean(), [0.59, 0.15, 0.85 / 3, 0.2, 0.2])
    np.testing.assert_allclose(np.sqrt(memory.variance()), [0.2888, 0, 0.0624, 0, 0], atol=5e-5)
    # The golden vector's evictable scope of 3 = 5 slots without the 2 untouchable ones: the protected newest, slot 0.
    c = choice(list(memory.mean()), list(memory.variance()), untouchable=2)
    assert evicted(c) == [1]
    assert evicted(choice([0.1, 0.2, 0.3, 0.4, 0.5], list(memory.variance()), untouchable=2)) == [1]


@pytest.mark.parametrize("one_by_one", [False, True])
def test_tova_last_row(one_by_one: bool) -> None:
    memory = watched(Tova(), one_by_one)
    np.testing.assert_array_equal(memory.sum, A[4])
    assert evicted(choice(list(memory.sum))) == [1]


def test_snapkv_pool() -> None:
    policy = SnapKV()
    policy.pool = 3
    values = np.array([0.1, 0.2, 0.6, 0.05, 0.05])
    np.testing.assert_array_equal(policy.pooled(values, np.ones(5, dtype=bool)), [0.2, 0.6, 0.6, 0.6, 0.05])
    inside = np.array([True, True, False, True, False])
    np.testing.assert_array_equal(policy.pooled(values, inside), [0.2, 0.2, 0.6, 0.05, 0.05])


def test_snapkv_window_votes_once() -> None:
    """40 uniform causal queries: the last 32 vote, and tokens before the window are seen by all 32."""
    rows = np.tril(np.ones((40, 40))) / np.arange(1, 41)[:, None]
    memory = Memory()
    memory.grow(40)
    SnapKV().observe(memory, rows, rows > 0, row(40), np.arange(40))
    np.testing.assert_array_equal(memory.count, [32] * 9 + list(range(31, 0, -1)))
    np.testing.assert_allclose(memory.sum[:8], [sum(1 / i for i in range(9, 41))] * 8)


@pytest.mark.parametrize(
    ("budget", "seen", "slots"),
    [(0.2, 2000, 400), (0.2, 2004, 400), (0.2, 2005, 401), (0.2, 100, 64), (48, 9, 48), (0.29, 1000, 290)],
)
def test_budget(budget: float | int, seen: int, slots: int) -> None:
    assert Budget.of(budget)(seen) == slots


def test_full_is_the_model() -> None:
    """With nothing evicted the simulator is attention: logits of every call as the unmodified model's, padded rows
    too."""
    model = tiny.llama(heads=6, kv_heads=2)
    ids, mask = tiny.left_padded([30, 17])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    oracle = Oracle(model, "full")
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
        for start, end in [(0, 20), (20, 21), (21, 30)]:
            part = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            ours = oracle(ids[:, start:end], **part)
            torch.testing.assert_close(ours, whole[:, end - 1], rtol=1e-4, atol=1e-4)  # float32 SDPA against float64


def test_streaming_is_a_mask() -> None:
    """Sinks and a window need no statistics, so a 4-d mask in the unmodified model says what the oracle must
    compute."""
    model, n, prompt = tiny.llama(), 24, 40
    ids = tiny.tokens(1, 60)
    i, j = torch.arange(60)[:, None], torch.arange(60)[None, :]
    window = (i < prompt) | (j < 4) | (j >= i - (n - 4))  # evicted after the call before: the query itself is the n+1st
    mask = ((j <= i) & window)[None, None]
    oracle = Oracle(model, "streaming_llm", n)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits[0]
        ours = [oracle(ids[:, :prompt])[0]] + [oracle(ids[:, t : t + 1])[0] for t in range(prompt, 60)]
    torch.testing.assert_close(torch.stack(ours), whole[prompt - 1 :], rtol=1e-4, atol=1e-4)
    assert oracle.simulator.kept(1)[0][1].tolist() == [0, 1, 2, 3, *range(40, 60)]


@pytest.mark.parametrize("policy", EVICTING)
def test_keeps_exactly_its_budget(policy: str) -> None:
    """Every head holds min(n, valid tokens), the padding never, and what must be protected always."""
    model = tiny.llama(heads=4, kv_heads=2)
    ids, mask = tiny.left_padded([80, 30])
    oracle = Oracle(model, policy, 48)
    oracle(ids, attention_mask=mask)
    for held in oracle.simulator.kept(0)[0]:
        assert len(held) == 48
        assert policy == "tova" or 79 in held
    for held in oracle.simulator.kept(1)[1]:
        assert held.tolist() == list(range(50, 80))


def test_objections() -> None:
    """Near ties pass, everything else is refused, so a comparison can fail."""
    near = choice([0.5, 0.1, 0.1 * (1 + 1e-6), 0.4, 0.2])
    assert near.kept().tolist() == [0, 2, 3, 4]
    assert objection(near, np.array([0, 2, 3, 4]), RTOL) is None
    assert objection(near, np.array([0, 1, 3, 4]), RTOL) is None
    assert "gap 0.3" in str(objection(near, np.array([0, 1, 2, 4]), RTOL))
    assert "protected" in str(objection(near, np.array([0, 1, 2, 3]), RTOL))
    assert "keeps 3 tokens" in str(objection(near, np.array([0, 3, 4]), RTOL))
    assert "not there" in str(objection(near, np.array([0, 3, 4, 9]), RTOL))
    assert "not there" in str(objection(near, np.array([0, 3, 4, 4]), RTOL))
    tied = choice([0.5, 0.1, 0.1, 0.4, 0.2])
    assert tied.kept().tolist() == [0, 1, 3, 4]
    assert "older" in str(objection(tied, np.array([0, 2, 3, 4]), RTOL))


def test_objections_to_a_scope() -> None:
    """A slot of large deviation stays; which of two equally spread slots stays may be float32's choice."""
    sure = choice([0.1, 0.2, 0.3, 0.4, 0.5], [0.9, 0.1, 0.1, 0.1, 0.1], untouchable=2)
    assert sure.kept().tolist() == [0, 2, 3, 4]
    assert objection(sure, np.array([0, 2, 3, 4]), RTOL) is None
    assert "untouchable" in str(objection(sure, np.array([1, 2, 3, 4]), RTOL))
    assert "gap" in str(objection(sure, np.array([0, 1, 3, 4]), RTOL))
    close = choice([0.1, 0.2, 0.3, 0.4, 0.5], [0.9, 0.9 * (1 - 1e-6), 0.1, 0.1, 0.1], untouchable=2)
    assert close.kept().tolist() == [0, 2, 3, 4]
    assert objection(close, np.array([1, 2, 3, 4]), RTOL) is None
    assert "scope" in str(objection(close, np.array([0, 1, 3, 4]), RTOL))
