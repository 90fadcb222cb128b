"""Rules in sentences: every built-in policy has some, and they say the numbers that were asked for."""

from __future__ import annotations

from typing import Any

import pytest
from kvpass.kernels.exits.record import TARGETS
from kvpass.kernels.rank.criterion import SCORES

from kvpass.plan.listing import example_rule
from kvpass.plan.rule import rule_of
from kvpass.plan.words import INTO, ORDERS, in_words
from kvpass.policy.load import load, names
from kvpass.policy.policy import Policy


def words(policy: Any, budget: Any) -> str:
    return " ".join(in_words(rule_of(Policy.load(policy).with_budget(budget))))


@pytest.mark.parametrize("name", names())
def test_every_policy_has_sentences(name: str) -> None:
    rule = example_rule(load(name))
    said = in_words(rule)
    assert said
    assert all(sentence.endswith(".") and not sentence.startswith(" ") for sentence in said)
    assert ("Nothing is evicted." in said) == (not rule.evicts)


def test_every_word_of_a_rule_has_a_sentence() -> None:
    assert set(ORDERS) == set(SCORES)
    assert set(INTO) == set(TARGETS)


def test_sentences_say_what_was_asked_for() -> None:
    said = words({"name": "mine", "extends": "snapkv", "protect": {"sinks": 7, "recent": 48}}, 0.35)
    assert "35 % of the tokens" in said
    assert "Protected: the first 7 tokens, the newest 48." in said
    assert "over 7 neighbours" in said
    said = words("streaming_llm", 1234)
    assert "at most 1,234 tokens." in said
    assert "Of the others the newest stay." in said
    assert "share the slots" in words("layer_defensivekv", 0.2)
    assert "on average over the heads that share" in words("ada_snapkv", 0.2)
    assert "merged (values) into the slots behind it" in words("cam", 0.2)
    assert "int8 keys and int8 values" in words("h2o_int8", 0.2)
    assert "stays, as codes alone" in words("mikv", 0.5)
    assert "read once more" in words("kvzip", 0.2)
    assert words("full", None) == "Nothing is evicted."
