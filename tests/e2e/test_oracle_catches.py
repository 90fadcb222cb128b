"""The comparison with the oracle notices small mistakes: each mutation of a policy must disagree with the
library's kept positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny
from oracle import policies
from oracle.drive import kept_positions
from oracle.hf import Oracle
from spelling import with_cache
from transformers import DynamicCache

import kvpass

pytestmark = pytest.mark.usefixtures("one_trace")
BUDGET = 48
Steps = list[tuple[torch.Tensor, list[torch.Tensor]]]


def record(policy: str) -> Steps:
    """(tokens fed, positions kept) of a prompt, 12 decode steps and two multi-token calls."""
    model = tiny.one_llama(6, 2)
    compiled = kvpass.compile(model, policy, BUDGET, inner="eager")
    cache, steps = DynamicCache(config=model.config), []
    for i, length in enumerate([90, *[1] * 12, 9, 33, 1, 1]):
        ids = tiny.tokens(1, length, seed=i)
        with torch.no_grad():
            compiled(ids, **with_cache(compiled, cache), logits_to_keep=1)
        steps.append((ids, kept_positions(cache)))
    return steps


@pytest.fixture(scope="module")
def recorded() -> Callable[[str], Steps]:
    known: dict[str, Steps] = {}

    def get(policy: str) -> Steps:
        if policy not in known:
            known[policy] = record(policy)
        return known[policy]

    return get


def replay(steps: Steps, policy: str, budget: int = BUDGET) -> Any:
    oracle = Oracle(tiny.one_llama(6, 2), policy, budget)
    for ids, positions in steps:
        oracle(ids)
        oracle.simulator.follow(positions)
    return oracle.simulator


@pytest.mark.parametrize("policy", policies.EVICTING)
def test_unmutated_agrees(policy: str, recorded: Callable[[str], Steps]) -> None:
    assert replay(recorded(policy), policy).near_ties == 0


def forget_past(self: Any, memory: Any, rows: Any, sees: Any, row: Any, candidates: Any) -> None:
    memory.sum = rows.sum(0)


def skip_own(self: Any, memory: Any, rows: Any, sees: Any, row: Any, candidates: Any) -> None:
    """The new token does not start with its own first probability."""
    rows = rows.copy()
    rows[np.arange(len(rows)), row.queries] = 0
    memory.sum = memory.sum + rows.sum(0)


def by_sum(self: Any, memory: Any) -> Any:
    return memory.sum


MUTATIONS: list[tuple[str, str, Any]] = [
    ("streaming_llm", "protected", lambda self, p, row, n: p < row.first + 3),
    ("h2o", "protected", lambda self, p, row, n: p >= row.end - n // 2 - 1),
    ("h2o", "observe", forget_past),
    ("h2o", "observe", skip_own),
    ("tova", "shared", False),
    ("tova", "protected", lambda self, p, row, n: p >= row.end - 1),
    ("snapkv", "window", 31),
    ("snapkv", "pool", 5),
    ("snapkv", "score", by_sum),
    ("roco", "score", by_sum),
    ("roco", "protected", lambda self, p, row, n: p >= row.end - 10),
]
"""Not here: RoCo's scope, which changes nothing in a random model. test_plain_decoder.py's test_roco_scope scripts
one where it does."""


@pytest.mark.parametrize(("policy", "name", "wrong"), MUTATIONS)
def test_mutation_is_caught(
    policy: str, name: str, wrong: Any, recorded: Callable[[str], Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = recorded(policy)
    monkeypatch.setattr(policies.POLICIES[policy], name, wrong)
    with pytest.raises(AssertionError, match=r"step .* layer .* row .* head .*: "):
        replay(steps, policy)


def test_wrong_budget_is_caught(recorded: Callable[[str], Steps]) -> None:
    with pytest.raises(AssertionError, match="keeps 48 tokens, not 47"):
        replay(recorded("h2o"), "h2o", 47)
