"""Policies as data: what loads, what is refused with which words, and when two are the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models.refused import refused, untouchable

import kvpass
from kvpass.errors import PolicyError
from kvpass.policy.load import PRESETS, names
from kvpass.policy.policy import Policy
from kvpass.policy.spec import Observe, Protect

SUM = {"observe": {"queries": 4}, "statistic": {"keep": ["sum"]}, "score": "sum"}


def spec(**fields: Any) -> dict[str, Any]:
    return {"name": "mine", **fields}


BAD: list[tuple[Any, Any, str, str]] = [
    ("h20", 0.2, "no policy named 'h20'", "did you mean 'h2o'"),
    ("SnapKV", 0.2, "no policy named 'SnapKV'", "did you mean 'snapkv'"),
    ("nonsense", 0.2, "no policy named", "built in: ada_pyramid, "),
    (5, 0.2, "a policy is not a int", "give a name"),
    (None, 0.2, "a policy is not a NoneType", "give a name"),
    ("missing.yaml", 0.2, "cannot read the policy file", "existing YAML file"),
    ("h2o", None, "no budget", "budget=0.2"),
    ("h2o", 0, "at least 1", "budget=1024"),
    ("h2o", -3, "at least 1", "budget=1024"),
    ("h2o", 0.0, "above 0 and at most at 1.0", "keeps a fifth"),
    ("h2o", 1.5, "above 0 and at most at 1.0", "give an int"),
    ("h2o", float("nan"), "above 0 and at most at 1.0", "keeps a fifth"),
    ("h2o", float("inf"), "above 0 and at most at 1.0", "keeps a fifth"),
    ("h2o", True, "not bool", "budget=0.2 or budget=1024"),
    ("h2o", "0.2", "not str", "budget=0.2 or budget=1024"),
    ("full", 0.5, "policy 'full' keeps everything", "evicting policy"),
    ("full", 1, "policy 'full' keeps everything", "leave budget out"),
    ("streaming_llm", 1, "1 slots, but 4 are protected", "raise the budget"),
    ("snapkv", 16, "16 slots, but 32 are protected", "protect less"),
    ({}, 0.2, "key 'name' is missing", "add `name:`"),
    (spec(bugdet=0.2), None, "unknown key 'bugdet'", "did you mean 'budget'"),
    (spec(observe={"querys": 4}), 0.2, "unknown key 'observe.querys'", "did you mean 'queries'"),
    (spec(protect={"zinks": 4}), 0.2, "unknown key 'protect.zinks'", "did you mean 'sinks'"),
    (spec(xyz=1), 0.2, "unknown key 'xyz'", "valid here: name, observe"),
    (spec(score="sun"), 0.2, "bad value 'sun' in 'score'", "did you mean 'sum'"),
    (spec(observe=5), 0.2, "bad value 5 in 'observe'", "object"),
    (spec(budget="0.2"), None, "bad value '0.2' in 'budget'", "valid"),
    (spec(budget=[1]), None, "bad value [1] in 'budget'", "valid"),
    (spec(observe={"queries": True}), 0.2, "in 'observe.queries'", "valid"),
    (spec(score="sum"), 0.2, "bad value in score", "needs statistic.keep to hold 'sum'"),
    (spec(**{**SUM, "score": "mean"}), 0.2, "bad value in score", "hold 'count'"),
    (spec(**SUM, scope=0.3), 0.2, "bad value in scope", "[sum, sumsq, count]"),
    (spec(scope=1.0), 0.2, "bad value in scope", "from 0 to below 1"),
    (spec(scope=float("nan")), 0.2, "bad value in scope", "from 0 to below 1"),
    (spec(statistic={"keep": ["sum"]}), 0.2, "bad value in observe.queries", "'all' or a number"),
    (spec(observe={"queries": 4}), 0.2, "bad value in statistic.keep", "add 'sum'"),
    (spec(**{**SUM, "observe": {"queries": -4}}), 0.2, "bad value in observe.queries", "number >= 0"),
    (spec(pool={"size": 7}), 0.2, "bad value in pool", "add it to statistic.keep"),
    (spec(**SUM, pool={"size": 4}), 0.2, "bad value in pool.size", "odd"),
    (
        spec(**{**SUM, "observe": {"queries": "all"}}, pool={"size": 3}),
        0.2,
        "bad value in statistic.across_calls",
        "fresh",
    ),
    (spec(protect={"sinks": -1}), 0.2, "bad value in protect.sinks", ">= 0"),
    (spec(protect={"recent": -1}), 0.2, "bad value in protect.recent", ">= 0"),
    (spec(protect={"recent": 1.0}), 0.2, "bad value in protect.recent", "below 1"),
    (spec(protect={"recent": float("nan")}), 0.2, "bad value in protect.recent", "below 1"),
    (spec(protect={"sinks": 40, "recent": 30}), 0.2, "70 are protected", "min_slots"),
    (spec(min_slots=0), 0.2, "bad value in min_slots", ">= 1"),
    (spec(**{**SUM, "statistic": {"keep": ["sum", "sum"]}}), 0.2, "bad value in statistic.keep", "once"),
    (spec(**{**SUM, "statistic": {"keep": ["count", "sum"]}}), 0.2, "bad value in statistic.keep", "order"),
    (spec(observe={("a",): 1}), 0.2, "keys of a policy are words", "valid"),
    (Policy("mine", score="bogus"), 0.2, "bad value 'bogus' in 'score'", "position"),  # type: ignore[arg-type]
    (Policy("mine", observe=Observe(queries="al")), 0.2, "'observe.queries'", "valid"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("policy", "budget", "what", "fix"), BAD, ids=lambda v: str(v)[:40])
def test_bad_policies_and_budgets(policy, budget, what, fix, monkeypatch):
    refused(policy, budget, what, fix, monkeypatch)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "no budget"),
        ({"policy": "h2o", "bugdet": 0.2}, "unknown option 'bugdet'"),
        ({"policy": "h20", "budget": 0.2}, "no policy named 'h20'"),
        ({"policy": "h2o", "budget": 2.0}, "above 0 and at most at 1.0"),
        ({"policy": "h2o"}, "no budget"),
        ({"policy": "h2o", "budget": 0.2, "inner": "indoctor"}, "no inner compiler 'indoctor'"),
    ],
)
def test_bad_options_of_torch_compile(options, what, monkeypatch):
    monkeypatch.setattr("kvpass.pipeline.compose.Backend.__call__", untouchable)
    with pytest.raises(PolicyError, match=what), torch.no_grad():
        torch.compile(torch.nn.Linear(2, 2), backend="kvpass", options=options)(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("- a\n- b\n", "holds a mapping"),
        ("", "holds a mapping"),
        ("name: [", "not valid YAML"),
        ("name: x\nscore: sum\n", "bad value in score"),
        ("name: x\n7: y\n", "unknown key '7'"),
    ],
)
def test_bad_files(text, what, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=what.replace("(", r"\(")) as caught:
        Policy.load(path)
    assert str(path) in caught.value.where


def test_a_file_that_is_no_text(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match="not valid YAML"):
        Policy.load(str(path))


@pytest.mark.parametrize("name", names())
def test_presets_load_and_come_back_from_yaml(name, tmp_path: Path):
    policy = Policy.load(name)
    assert policy.name == name
    assert policy.source
    path = tmp_path / "copy.yml"
    data = policy.to_dict()
    data["statistic"]["keep"] = list(data["statistic"]["keep"])
    path.write_text(yaml.safe_dump(data))
    assert Policy.load(path) == policy == Policy.load(policy) == Policy.load(data)
    assert Policy.load(PRESETS / f"{name}.yaml") == policy


def test_fingerprints_tell_what_behaves_differently():
    h2o = Policy.load("h2o").with_budget(0.2)
    same = replace(h2o, paper="elsewhere", source="", notes="none")
    others = [h2o.with_budget(0.3), replace(h2o, protect=Protect(recent=0.4)), Policy.load("tova").with_budget(0.2)]
    assert same.fingerprint == h2o.fingerprint
    assert len({p.fingerprint for p in [h2o, *others]}) == 4
    assert len(h2o.fingerprint) == 12


def test_one_slot_is_not_everything():
    """1 == 1.0 in Python, and Dynamo shares compiled code between backends that are equal."""
    slot, whole = (Policy.load("tova").with_budget(budget) for budget in (1, 1.0))
    assert slot != whole
    assert slot.fingerprint != whole.fingerprint
    assert kvpass.backend("tova", 1) != kvpass.backend("tova", 1.0)


def test_equal_backends():
    one, two = (kvpass.backend("h2o", 0.2, inner="eager") for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != kvpass.backend("h2o", 0.2, inner="aot_eager")
    assert Policy.load("h2o") == Policy.load("h2o")
    assert Policy.load("h2o") != "h2o"


def test_a_policy_may_bring_its_own_budget():
    own = Policy.load(spec(budget=100))
    assert own.with_budget(None).budget == 100
    assert own.with_budget(0.5).budget == 0.5
    assert Policy.load("full").with_budget(None).budget == 1.0
    assert Policy.load("full").with_budget(1.0).budget == 1.0
