"""Rules: the arithmetic of budgets is exact, and the text that ops take comes back as it went."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpass.kernels.budget import budget, kept
from kvpass.kernels.codecs.storage import Storage
from kvpass.kernels.rank.ranking import reach_of, recent_of
from kvpass.kernels.rule import OPS_VERSION, Rule, all_words

from kvpass.plan.rule import rule_of
from kvpass.policy.load import names
from kvpass.policy.policy import Policy

SEEN = st.integers(0, 2_000_000)
SHARES = st.integers(1, 9_999).map(lambda n: n / 10_000)


@settings(max_examples=500, deadline=None)
@given(SHARES, SEEN)
def test_a_fraction_is_taken_as_it_is_written(share, seen):
    rule = rule_of(Policy.load({"name": "mine", "min_slots": 1}).with_budget(share))
    assert budget(rule, seen) == max(1, floor(Fraction(str(share)) * seen))
    assert kept(rule, seen) == min(seen, budget(rule, seen))


@settings(max_examples=200, deadline=None)
@given(SHARES, st.integers(1, 5_000), SHARES)
def test_recent_and_scope_are_exact_too(recent, slots, scope):
    keep = {"observe": {"queries": "all"}, "statistic": {"keep": ["sum", "sumsq", "count"]}}
    policy = Policy.load({"name": "mine", **keep, "score": "mean", "scope": scope, "protect": {"recent": recent}})
    rule = rule_of(policy.with_budget(slots))
    assert recent_of(rule, slots) == floor(Fraction(str(recent)) * slots)
    assert reach_of(rule, slots) == floor(Fraction(str(scope)) * slots) + 1


@given(st.integers(1, 10_000), SEEN)
def test_slots_are_taken_as_said(slots, seen):
    rule = rule_of(Policy.load("h2o").with_budget(slots))
    assert budget(rule, seen) == slots
    assert rule.evicts


@given(SHARES, SEEN)
def test_the_floor_holds_fractions_only(share, seen):
    assert budget(rule_of(Policy.load("h2o").with_budget(share)), seen) >= 64


WITH_THRESHOLD = [name for name in names() if Policy.load(name).allocate.heads == "threshold"]


@pytest.mark.parametrize("name", WITH_THRESHOLD)
def test_a_threshold_evicts_whatever_the_budget(name):
    rule = rule_of(Policy.load(name).with_budget(1.0) if name != "dms" else replace(Policy.load(name), budget=1.0))
    assert rule.evicts
    assert budget(rule, 1000) == 1000


@pytest.mark.parametrize("name", [name for name in names() if name not in WITH_THRESHOLD])
def test_everything_observes_nothing(name):
    policy = Policy.load(name)
    rule = rule_of(replace(policy.with_budget(1.0), layers={}))
    assert rule == (Rule() if policy.store.k == "dense" else Rule(rule[Storage]))
    assert not rule.evicts
    assert Rule().encode() == f"ops={OPS_VERSION}"


CHOICES = {
    "granule_by": ["mean", "top_half"],
    "weight": ["none", "l1", "vo_l1"],
    "scorer": ["", "knorm"],
    "table": ["", "a/b%20c.pt"],
    "ranks_group": ["", "0", "tp%20group"],
    "options": ["", "a:int:1,b:str:x%20y"],
    "group": ["mean", "max"],
    "heads": ["each", "all"],
    "share": ["", "model", "threshold"],
    "when": ["always", "calls", "first"],
    "decode": ["add", "replace", "none"],
    "pool": ["none", "avg", "max"],
    "merge_into": ["", "nearest_key", "run", "one_slot"],
    "merge_halves": ["values", "both"],
    "merge_weight": ["even", "cosine", "cosine_norm", "gaussian"],
    "merge_mean": ["weights", "count", "none"],
    "merge_gate": ["none", "moving", "chance"],
    "merge_at": ["always", "steps", "calls"],
    "merge_bias": ["none", "count"],
    "k_as": ["dense", "int4"],
    "v_as": ["dense", "int8", "fp8_e4m3"],
    "k_fit": ["none", "balance", "range", "channels", "spread", "atoms"],
    "v_fit": ["none", "range", "atoms"],
    "score": ["position", "sum", "mean"],
}


def values(name: str, default: object) -> st.SearchStrategy[object]:
    if name == "reads":
        return st.sampled_from([(), ("keys",), ("keys", "rows")])
    if name in ("stats", "emits"):
        return st.sampled_from([(), ("sum",), ("sum", "count"), ("sum", "sumsq", "count")])
    if name in CHOICES:
        return st.sampled_from(CHOICES[name])
    if isinstance(default, float):
        return st.floats(0, 1)
    return st.booleans() if isinstance(default, bool) else st.integers(-1, 100_000)


WORDS = all_words()
RULES = st.builds(Rule, **{word: values(word, default) for word, default in WORDS.items()})


@settings(max_examples=300, deadline=None)
@given(RULES)
def test_text_and_back(rule):
    text = rule.encode()
    assert Rule.parse(text) == rule
    for one in Rule.parse(text):
        assert [type(value) for value in vars(one).values()] == [type(WORDS[word]) for word in vars(one)]


@given(RULES, RULES)
def test_equal_texts_are_equal_rules(one, two):
    assert (one.encode() == two.encode()) == (one == two)


ROCO = "scope_num=3 scope_den=10 sinks=4 recent=10"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("streaming_llm", "sinks=4 den=5 floor=64"),
        ("h2o", "stats=sum queries=-1 decode=add score=sum recent_num=1 recent_den=2 den=5 floor=64"),
        ("tova", "stats=sum queries=1 carry=0 decode=replace score=sum heads=all den=5 floor=64"),
        (
            "snapkv",
            "stats=sum+count queries=32 carry=0 decode=add pool=max pool_size=7 score=mean recent=32 den=5 floor=64",
        ),
        ("roco", f"stats=sum+sumsq+count queries=-1 decode=add score=mean {ROCO} den=5 floor=64"),
    ],
)
def test_what_presets_become(name, text):
    assert rule_of(Policy.load(name).with_budget(0.2)).encode() == f"ops={OPS_VERSION} {text}"
