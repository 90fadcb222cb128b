"""Pyramids share a budget out over layers: together they never hold more than even budgets would, at any moment."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from kvpass.kernels.budget import budget as slots_after
from kvpass.kernels.budget import kept
from kvpass.kernels.rule import Rule
from models import tiny
from oracle.drive import Conversation
from oracle.policies import PyramidKV
from transformers import DynamicCache, LlamaModel

import kvpass
from kvpass.plan.rule import rule_of
from kvpass.policy.policy import Policy

pytestmark = pytest.mark.usefixtures("one_trace")

LAYERS = 3
PAST = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""What transformers calls it."""


def even(budget: float | int, seen: int) -> int:
    """Slots per head of a uniform policy: the definition of docs/concepts.md."""
    return budget if isinstance(budget, int) else max(64, int(seen * budget))


def check(cache: Any, budget: float | int, seen: list[int], columns: int) -> None:
    """Live slots of each row over all layers against even budgets of its valid tokens (`seen`), and bytes against those
    of the columns: how many of a batch's columns are padding in every turn is known on the device only.
    """
    sites = kvpass.inspect(cache).layers
    for row, tokens in enumerate(seen):
        live = [int((site.positions[row] >= 0).sum()) for site in sites]
        heads = len(sites[0].positions[row])
        assert sum(live) <= LAYERS * heads * min(even(budget, tokens), tokens), (tokens, live)
    rows, heads, dim = len(seen), len(sites[0].positions[0]), sites[0].keys[0].shape[-1]
    slot = 2 * dim * sites[0].keys[0].element_size()
    spare = LAYERS  # one slot for the token to come, in each layer
    allowed = LAYERS * 1.03 * even(budget, columns) + spare
    assert kvpass.report(cache).to_dict()["bytes"] <= rows * heads * slot * allowed


PYRAMIDS = [pytest.param("pyramidkv", 80, marks=pytest.mark.wide), ("pyramidkv", 0.3), ("ada_pyramid", 80)]


@pytest.mark.parametrize(("policy", "budget"), PYRAMIDS)
def test_a_budget_holds_while_tokens_come(policy: str, budget: float | int) -> None:
    """Prompts shorter than the budget, equal to it, within twice, and longer, and short rows beside long ones; then
    generated tokens, a second turn of rows as unequal, and more."""
    model = kvpass.compile(tiny.one_llama(4, 2, layers=LAYERS), policy, budget, inner="eager")
    one = torch.ones(1, 1, dtype=torch.long)
    conversations = (([20], 200, [40]), ([80], 40, [9]), ([110], 20, [2]), ([400], 20, [300]))
    for first, alone, second in (*conversations, ([300, 70, 9], 60, [5, 90, 40])):
        cache, seen = DynamicCache(config=model.config), [0] * len(first)
        mask = torch.zeros(len(first), 0, dtype=torch.long)
        for lengths, steps in ((first, alone), (second, 20)):
            ids, own = tiny.left_padded(lengths)
            for new, shown in ((ids, own), *[(tiny.tokens(len(first), 1), one.expand(len(first), 1))] * steps):
                mask = torch.cat([mask, shown], 1)
                with torch.no_grad():
                    model(new, attention_mask=mask, use_cache=True, logits_to_keep=1, **{PAST: cache})
                seen = [a + b for a, b in zip(seen, shown.sum(1).tolist(), strict=True)]
                if shown.shape[1] > 1 or seen[0] % 20 < 2:
                    check(cache, budget, seen, mask.shape[1])
        layers = [int((site.positions[0] >= 0).sum()) // 2 for site in kvpass.inspect(cache).layers]
        assert layers == sorted(layers, reverse=True)
        assert layers[0] > layers[-1] + 30, "no pyramid"


@pytest.mark.parametrize("layers", [2, 3, 7, 30])
@pytest.mark.parametrize("budget", [33, 52, 64, 1024, 0.05, 0.2, 0.5, 0.52, 0.6, 0.8, 0.95])
def test_budgets_never_fall(budget: float | int, layers: int) -> None:
    """A step evicts one slot of a head at most, and a batch's slots are as many as its longest row's."""
    rules = [rule_of(Policy.load("pyramidkv").with_budget(budget), at, layers) for at in range(layers)]
    before = [0] * layers
    for seen in range(1, 1500):
        now = [slots_after(rule, seen) for rule in rules]
        assert all(a <= b for a, b in zip(before, now, strict=True)), seen
        assert sum(now) <= layers * even(budget, seen)
        assert now == sorted(now, reverse=True)
        before = now
    if isinstance(budget, float):
        assert sum(kept(rule, 5000) for rule in rules) >= layers * (5000 * budget - 2), "a part of the budget lies idle"


def test_a_share_above_a_half_is_less_steep() -> None:
    """The first layer keeps all that it has seen, and no more."""
    first, last = (
        slots_after(Rule(queries=32, num=3, den=4, floor=64, beta=20, layer=at, layers=2), 4000) for at in (0, 1)
    )
    assert 3950 <= first <= 4000
    assert first + last == 6000


@pytest.mark.parametrize("when", ["always", "calls"])
def test_a_padded_pyramid(when: str) -> None:
    """The short row keeps what it would keep alone."""
    meaning = PyramidKV()
    meaning.when = when
    policy = {"name": "late", "extends": "pyramidkv", "when": when}
    conversation = Conversation(tiny.one_llama(4, 2, layers=3), policy, 64, meaning=meaning, inner="eager")
    mask = torch.ones(2, 130, dtype=torch.long)
    mask[1, :80] = 0
    conversation.call(tiny.tokens(2, 130) * mask, mask)
    token = conversation.decode(tiny.tokens(2, 1), 9)
    conversation.call(torch.cat([token, tiny.tokens(2, 4, seed=1)], 1))
    conversation.decode(token, 5)
    assert conversation.simulator.near_ties <= 0.005 * conversation.simulator.compared


def test_a_pyramid_whose_second_turn_is_padded() -> None:
    """One row says little in the second turn, and stays below the first layer's budget, which the other reaches."""
    conversation = Conversation(tiny.one_llama(4, 2, layers=3), "pyramidkv", 64, meaning=PyramidKV(), inner="eager")
    conversation.call(tiny.tokens(2, 50), torch.ones(2, 50, dtype=torch.long))
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :65] = 0
    token = conversation.call(tiny.tokens(2, 70, seed=1) * mask, mask)
    conversation.decode(token, 5)
    assert conversation.simulator.near_ties <= 0.005 * conversation.simulator.compared
