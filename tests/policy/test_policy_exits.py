"""What a policy may say of slots that go, and what it may not."""

from __future__ import annotations

from typing import Any

import pytest
from kvpass.kernels.exits.record import Merge
from kvpass.kernels.exits.refit import Refit
from kvpass.kernels.rank.places import Protected
from kvpass.kernels.rule import Rule

from kvpass.errors import PolicyError
from kvpass.plan.rule import rule_of
from kvpass.policy.policy import Policy


def rule(**said: Any) -> Any:
    return rule_of(Policy.load({"name": "mine", **said}).with_budget(96))


def test_drop_is_what_it_was() -> None:
    plain = rule(extends="h2o")
    assert rule(extends="h2o", evicted="drop") == plain == rule(extends="h2o", evicted={})
    assert rule(extends="d2o", evicted="drop", protect={"sinks": 0}) == plain
    assert "merge" not in plain.encode()


def test_short_and_long() -> None:
    short = rule(extends="h2o", evicted="merge")
    assert short == rule(extends="h2o", evicted={"merge": {}})
    assert short[Merge] == Merge("nearest_key")
    assert rule(extends="merging") == rule(extends="snapkv", evicted="merge")


def test_parts_are_merged_key_by_key() -> None:
    own = rule(extends="d2o", evicted={"merge": {"halves": "values"}})[Merge]
    assert (own.merge_gate, own.merge_halves, own.merge_weight) == ("moving", "values", "cosine")


def test_words_that_mean_nothing_here_make_no_other_rule() -> None:
    assert rule(extends="h2o", evicted={"merge": {"sigma": 2.0, "count": 3}}) == rule(extends="h2o", evicted="merge")


def test_one_slot_is_one_more_sink() -> None:
    one = {"into": "one_slot", "halves": "both", "weight": "even"}
    assert rule(extends="streaming_llm", evicted={"merge": one})[Protected].sinks == 5
    with pytest.raises(PolicyError, match="5 are protected"):
        Policy.load({"name": "mine", "extends": "streaming_llm", "evicted": {"merge": one}}).with_budget(4)


@pytest.mark.parametrize(
    ("said", "field", "fix"),
    [
        ({"merge": {"treshold": 0.5}}, "evicted.merge.treshold", "did you mean 'threshold'"),
        ({"merges": {}}, "evicted.merges", "valid here: merge"),
        ({"merge": {"into": "nearest"}}, "evicted.merge.into", "'nearest_key'"),
        ("merged", "evicted", "give"),
        ({"merge": {"threshold": 1.5}}, "evicted.merge.threshold", "give a cosine"),
        ({"merge": {"count": 0}}, "evicted.merge.count", "1 or more"),
        ({"merge": {"sigma": 0.0}}, "evicted.merge.sigma", "above 0"),
        ({"merge": {"into": "run", "at": "calls"}}, "evicted.merge.threshold", "e.g. 0.75"),
        ({"merge": {"into": "run", "threshold": 0.5}}, "evicted.merge.at", "at: calls"),
        ({"merge": {"into": "one_slot"}}, "evicted.merge.into", "weight: even"),
        ({"merge": {"into": "next", "gate": "moving"}}, "evicted.merge.gate", "into: nearest_key"),
        ({"merge": {"bias": "count"}}, "evicted.merge.bias", "into: one_slot"),
        ({"refit": {"queries": 0}}, "evicted.refit.queries", "1 or more"),
        ({"refit": {"bias": [0.5, 3.0]}}, "evicted.refit.bias", "around 0"),
        ({"refit": {"bias": [-3.0]}}, "evicted.refit.bias", "add"),
        ({"refit": {"iters": -1}}, "evicted.refit.iters", "0 to 1000"),
        ({"refit": {"ridge": -1.0}}, "evicted.refit.ridge", ">= 0"),
        ({"refit": {"beta": 1}}, "evicted.refit.beta", "valid here: queries, bias"),
        ({"merge": {}, "refit": {}}, "evicted", "evicted.merge: null"),
        ({"to": "int2", "refit": {}}, "evicted", "leave evicted.to or evicted.refit out"),
        ({"merge": {"gate": "moving", "threshold": 0.2}}, "evicted.merge.threshold", "leave threshold out"),
    ],
)
def test_words_that_cannot_be(said: Any, field: str, fix: str) -> None:
    with pytest.raises(PolicyError, match=field) as error:
        rule(extends="h2o", evicted=said)
    assert fix in str(error.value)


NEXT = {"into": "next", "weight": "even", "mean": "none"}


@pytest.mark.parametrize(
    ("policy", "fix"),
    [
        ({"extends": "knorm", "evicted": {"merge": {**NEXT, "gate": "chance"}}}, "add 'sum'"),
        ({"extends": "ada_snapkv", "evicted": {"merge": {"gate": "moving"}}}, "leave allocate out"),
        ({"extends": "cascading", "evicted": "merge"}, "leave allocate.rings out"),
        ({"extends": "h2o", "evicted": "merge", "store": "int4"}, "store: dense"),
        ({"extends": "am_fast", "store": "int4"}, "store: dense"),
        ({"extends": "cascading", "evicted": "refit"}, "leave allocate.rings out"),
        ({"extends": "layer_defensivekv", "evicted": "refit"}, "set allocate.heads: flat"),
        ({"extends": "streaming_llm_reindexed", "evicted": {"merge": {"halves": "both"}}}, "halves: values"),
    ],
)
def test_combinations_that_cannot_work(policy: dict[str, Any], fix: str) -> None:
    with pytest.raises(PolicyError, match="evicted") as error:
        rule(**policy)
    assert fix in str(error.value)


def test_fits() -> None:
    assert rule(extends="h2o", evicted="refit") == rule(extends="h2o", evicted={"refit": {}})
    own = rule(extends="am_fast", evicted={"refit": {"bias": [-1, 2], "values": False}})[Refit]
    assert own == Refit(256, -1.0, 2.0, 2, 0.1, False)
    assert rule(extends="am_fast", evicted={"refit": None}) == rule(extends="am_fast", evicted="drop")
    encoded = rule(extends="am_fast", evicted={"refit": {"bias": [-1, 2], "ridge": 1e-4}})
    assert Rule.parse(encoded.encode()) == encoded
    assert "refit" not in rule(extends="snapkv").encode()


def test_keys_that_turn_cannot_be_fitted() -> None:
    with pytest.raises(PolicyError, match="positions: kept"):
        rule(extends="streaming_llm_reindexed", evicted="refit")


def test_layers_may_differ() -> None:
    spec = {"name": "mine", "extends": "d2o", "layers": {"0": {"evicted": "drop"}}}
    policy = Policy.load(spec).with_budget(96)
    assert [bool(rule_of(policy, at, 2)[Merge].merge_into) for at in range(2)] == [False, True]
