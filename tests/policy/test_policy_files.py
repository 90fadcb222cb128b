"""Policy files that are wrong: each is refused once, with the field and the fix, before any compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kvpass.kernels.budget import budget as budget_of
from models.refused import untouchable

import kvpass
from kvpass.errors import PolicyError
from kvpass.plan.rule import rule_of
from kvpass.policy.load import names
from kvpass.policy.policy import Policy

WINDOW: dict[str, Any] = {"observe": {"queries": 32}}
CAKE: dict[str, Any] = {**WINDOW, "score": "cake"}
SNAP: dict[str, Any] = {"extends": "snapkv"}
SUMS: dict[str, Any] = {"observe": {"queries": "all"}, "statistic": {"keep": ["sum"]}, "score": "sum"}
PYRAMID: dict[str, Any] = {"extends": "pyramidkv"}
NAN, INF = float("nan"), float("inf")


def spec(**fields: Any) -> dict[str, Any]:
    return {"name": "mine", **fields}


CASES: list[tuple[dict[str, Any], Any, str, str]] = [
    # unknown keys, at each level
    (spec(int=1), 0.2, "unknown key 'int'", "valid here"),
    (spec(statistic={"keeps": []}), 0.2, "unknown key 'statistic.keeps'", "did you mean 'keep'"),
    (spec(**SUMS, pool={"sise": 7}), 0.2, "unknown key 'pool.sise'", "did you mean 'size'"),
    (spec(score="random", granule={"width": 3}), 0.2, "unknown key 'granule.width'", "valid here: size, by"),
    (spec(**SUMS, weight={"bye": "l1"}), 0.2, "unknown key 'weight.bye'", "did you mean 'by'"),
    (spec(allocate={"layer": "pyramid"}), 0.2, "unknown key 'allocate.layer'", "did you mean 'layers'"),
    (spec(extend="h2o"), 0.2, "unknown key 'extend'", "did you mean 'extends'"),
    (spec(**CAKE, options={"gama": 1.0}), 0.2, "unknown key 'options.gama'", "did you mean 'gamma'"),
    (spec(score="knorm", options={"x": 1}), 0.2, "unknown key 'options.x'", "options of 'knorm': none"),
    (spec(**SUMS, options={"x": 1}), 0.2, "bad value in options", "score 'sum' has no options"),
    # wrong types and choices
    ({"name": 5}, 0.2, "bad value 5 in 'name'", "string"),
    ({"name": ""}, 0.2, "bad value in name", "on one line"),
    ({"name": "a\nb"}, 0.2, "bad value in name", "on one line"),
    ({"name": None}, 0.2, "bad value None in 'name'", "string"),
    (spec(observe=None), 0.2, "bad value None in 'observe'", "mapping"),
    (spec(observe=[32]), 0.2, "bad value [32] in 'observe'", "mapping"),
    (spec(observe={"queries": "most"}), 0.2, "bad value 'most' in 'observe.queries'", "'all'"),
    (spec(observe={"queries": 1.5}), 0.2, "bad value 1.5 in 'observe.queries'", "integer or 'all'"),
    (spec(observe={"group": "sum"}), 0.2, "in 'observe.group'", "'mean' or 'max'"),
    (spec(observe={"heads": "both"}), 0.2, "in 'observe.heads'", "'each' or 'all'"),
    (spec(statistic={"keep": "sum"}), 0.2, "bad value 'sum' in 'statistic.keep'", "a list"),
    (spec(statistic={"keep": ["smu"]}), 0.2, "bad value 'smu' in 'statistic.keep.0'", "'sum'"),
    (spec(statistic={"decode": "sometimes"}), 0.2, "in 'statistic.decode'", "'replace'"),
    (spec(pool=7), 0.2, "bad value 7 in 'pool'", "mapping"),
    (spec(**SUMS, pool={"kind": "median"}), 0.2, "in 'pool.kind'", "'avg' or 'max'"),
    (spec(score=["sum"]), 0.2, "bad value ['sum'] in 'score'", "string"),
    (spec(options=["gamma"]), 0.2, "in 'options'", "mapping"),
    (spec(**CAKE, options={"gamma": [1]}), 0.2, "bad value [1] in 'options.gamma'", "number"),
    (spec(**CAKE, options={"gamma": "much"}), 0.2, "bad value 'much' in 'options.gamma'", "give a float"),
    (spec(**CAKE, options={"pool": 5.0}), 0.2, "bad value 5.0 in 'options.pool'", "give a int"),
    (spec(score="lag", options={"cross": 1}), 0.2, "bad value 1 in 'options.cross'", "give a bool"),
    (spec(granule={"size": True}), 0.2, "bad value True in 'granule.size'", "integer"),
    (spec(**SUMS, weight={"by": "l3"}), 0.2, "in 'weight.by'", "'vo_l1'"),
    (spec(**SUMS, weight={"floor": "1e-4"}), 0.2, "bad value '1e-4' in 'weight.floor'", "1.0e-4"),
    (spec(allocate={"layers": "pyramids"}), 0.2, "in 'allocate.layers'", "'pyramid'"),
    (spec(allocate={"heads": "each"}), 0.2, "in 'allocate.heads'", "'flat'"),
    (spec(sample="half"), 0.2, "bad value 'half' in 'sample'", "number"),
    (spec(seed=1.5), 0.2, "bad value 1.5 in 'seed'", "integer"),
    (spec(seed="1"), 0.2, "bad value '1' in 'seed'", "integer"),
    (spec(decay="yes"), 0.2, "in 'decay'", "boolean"),
    (spec(min_slots=64.0), 0.2, "in 'min_slots'", "integer"),
    (spec(protect=[4]), 0.2, "in 'protect'", "mapping"),
    (spec(protect={"sinks": 0.1}), 0.2, "in 'protect.sinks'", "integer"),
    (spec(notes=5), 0.2, "bad value 5 in 'notes'", "string"),
    # values out of range
    (spec(seed=-1), 0.2, "bad value in seed", "from 0 to"),
    (spec(seed=2**31), 0.2, "bad value in seed", "up to 2147483647"),
    (spec(min_slots=10**30), 0.2, "bad value in min_slots", "up to"),
    (spec(observe={"queries": 2**40}), 0.2, "bad value in observe.queries", "up to"),
    (spec(), 2**31, "at most 2147483647", "budget=1024"),
    (spec(**CAKE, options={"gamma": 2**70}), 0.2, "bad value in options.gamma", "up to"),
    (spec(score="random", sample=NAN), 0.2, "bad value in sample", "below 1"),
    (spec(score="random", sample=1.0), 0.2, "bad value in sample", "below 1"),
    (spec(score="random", granule={"size": 1}), 0.2, "bad value in granule.size", "2 or more"),
    (spec(**SUMS, weight={"floor": INF}), 0.2, "bad value in weight.floor", ">= 0"),
    (spec(**SUMS, weight={"floor": -1.0}), 0.2, "bad value in weight.floor", ">= 0"),
    (spec(**SUMS, weight={"after": 1.0}), 0.2, "bad value in weight.after", "below 1"),
    (spec(**SUMS, weight={"after": NAN}), 0.2, "bad value in weight.after", "below 1"),
    (spec(**PYRAMID, allocate={"beta": 1}), 0.2, "bad value in allocate.beta", "2 or more"),
    (spec(**SUMS, allocate={"heads": "flat", "safeguard": NAN}), 0.2, "bad value in allocate.safeguard", "0 to 1"),
    (spec(**SUMS, allocate={"heads": "flat", "safeguard": 1.1}), 0.2, "bad value in allocate.safeguard", "0 to 1"),
    (spec(**CAKE, options={"gamma": NAN}), 0.2, "bad value nan in 'options.gamma'", "finite"),
    (spec(**CAKE, options={"gamma": INF}), 0.2, "bad value inf in 'options.gamma'", "finite"),
    (spec(**CAKE, options={"pool": 4}), 0.2, "bad value 4 in 'options.pool'", "odd"),
    (spec(score="lag", options={"block": 0}), 0.2, "bad value 0 in 'options.block'", "2 or more"),
    (spec(**WINDOW, score="defensive", options={"nucleus": 2}), 0.2, "bad value 2 in 'options.nucleus'", "0 to 1"),
    (spec(budget=NAN), None, "above 0 and at most at 1.0", "keeps a fifth"),
    (spec(budget=INF), None, "above 0 and at most at 1.0", "keeps a fifth"),
    # combinations
    (spec(score="kakes"), 0.2, "bad value 'kakes' in 'score'", "did you mean 'cake'"),
    (spec(score="cake"), 0.2, "bad value in observe.queries", "observation window"),
    (spec(score="cake", observe={"queries": "all"}), 0.2, "bad value in observe.queries", "give a number"),
    (spec(**WINDOW, score="window_sum"), 0.2, "bad value in statistic.keep", "say which"),
    (spec(**CAKE, statistic={"keep": ["sum"]}), 0.2, "bad value in statistic.keep", "leave it out"),
    (spec(**SUMS, granule={"size": 4}), 0.2, "bad value in granule", "window_sum"),
    (spec(**SUMS, sample=0.3), 0.2, "bad value in sample", "window_sum"),
    (spec(**CAKE, scope=0.3), 0.2, "bad value in scope", "score: mean"),
    (spec(weight={"by": "l1"}), 0.2, "bad value in weight", "a position has no weight"),
    (spec(extends="roco", weight={"after": 0.5}), 0.2, "bad value in weight.after", "leave one of them out"),
    (spec(extends="tova", weight={"by": "l1"}), 0.2, "bad value in weight", "observe.heads: each"),
    (spec(extends="tova", allocate={"heads": "flat"}), 0.2, "bad value in allocate.heads", "equally many"),
    (spec(allocate={"heads": "flat"}), 0.2, "bad value in allocate.heads", "rank all heads alike"),
    (spec(allocate={"layers": "flat"}), 0.2, "bad value in allocate.layers", "rank all layers alike"),
    (
        spec(extends="ada_snapkv", allocate={"layers": "flat"}),
        0.2,
        "bad value in allocate.heads",
        "leave allocate.heads",
    ),
    (spec(extends="tova", allocate={"layers": "flat"}), 0.2, "bad value in allocate.layers", "equally many"),
    (spec(extends="snapkv", allocate={"layers": "preference"}), 0.2, "bad value in allocate.layers", "score: cake"),
    (spec(allocate={"heads": "threshold"}), 0.2, "bad value in allocate.heads", "protect.recent"),
    (spec(extends="corm", allocate={"layers": "pyramid"}), 0.2, "bad value in allocate.layers", "leave it out"),
    (spec(extends="corm", allocate={"threshold": NAN}), 0.2, "bad value in allocate.threshold", "finite"),
    (spec(extends="h2o", allocate={"threshold": 0.5}), 0.2, "bad value in allocate.threshold", "heads: threshold"),
    (spec(score="last", observe={"queries": "all"}, statistic={"keep": ["sum"]}), 0.2, "bad value in score", "'last'"),
    (spec(extends="cascading", allocate={"rings": -1}), 0.2, "bad value in allocate.rings", "e.g. 4"),
    (spec(extends="cascading", allocate={"heads": "flat"}), 0.2, "bad value in allocate.rings", "leave the shares"),
    (spec(extends="cascading", protect={"recent": 8}), 0.2, "bad value in protect", "sinks only"),
    (spec(extends="cascading", score="position"), 0.2, "bad value in allocate.rings", "score: sum"),
    (spec(extends="cascading"), 7, "can be as small as 7 slots, but 8", "raise the budget"),
    (spec(extends="h2o", layers={"a": {}}), 0.2, "'a' in 'layers' names no layer", "a range"),
    (spec(extends="h2o", layers={"3-1": {}}), 0.2, "'3-1' in 'layers' names no layer", "-1 for the last"),
    (spec(extends="h2o", layers={"0": 3}), 0.2, "bad value 3 in 'layers.0'", "mapping"),
    (spec(extends="h2o", layers=[{}]), 0.2, "in 'layers'", "mapping"),
    (spec(extends="h2o", layers={"0": {"protect": {"sink": 1}}}), 0.2, "unknown key 'protect.sink'", "'sinks'"),
    (spec(extends="h2o", layers={"0": {"name": "x"}}), 0.2, "unknown key 'name'", "for people"),
    (spec(extends="h2o", layers={"0": {"extends": "h3o"}}), 0.2, "no policy named 'h3o'", "did you mean 'h2o'"),
    (spec(extends="h2o", layers={"0": {"protect": {"sinks": 99}}}), 0.2, "131 are protected", "protect less"),
    (spec(extends="h2o", layers={"0": {"allocate": {"layers": "flat"}}}), 0.2, "layers.0.allocate.layers", "outside"),
    (spec(extends="layer_defensivekv", layers={"0": {"budget": 0.5}}), 0.2, "bad value in layers.0", "budget: 1.0"),
    (spec(when="prompt"), 0.2, "in 'when'", "'always'"),
    (spec(every=0), 0.2, "bad value in every", "1 or more"),
    (spec(every=2.5), 0.2, "in 'every'", "int"),
    (spec(extends="h2o", when="first", every=4), 0.2, "bad value in every", "leave one of both out"),
    (spec(extends="corm", every=4), 0.2, "bad value in every", "when: calls"),
    (spec(extends="cascading", every=4), 0.2, "bad value in every", "leave it out"),
    (spec(extends="cascading", when="calls"), 0.2, "bad value in when", "leave it out"),
    (spec(extends="ada_snapkv", when="first"), 0.2, "bad value in when", "when: calls"),
    (spec(positions="re-indexed"), 0.2, "in 'positions'", "'reindexed'"),
    (spec(extends="fastgen", protect={"tokens": False}), 0.2, "bad value in protect.tokens", "protect.tokens: true"),
    (spec(decay=True), 0.2, "bad value in decay", "scorer"),
    (spec(**WINDOW, statistic={"keep": ["important"]}, score="important"), 0.2, "bad value in score", "'count'"),
    # budgets below what is protected
    (spec(**SNAP, protect={"sinks": 8}), 39, "39 slots, but 40 are protected", "raise the budget"),
    (spec(**PYRAMID, protect={"sinks": 4}), 64, "last layer can be as small as 33 slots, but 36", "protect less"),
    (spec(**PYRAMID, protect={"sinks": 4}), 0.2, "last layer can be as small as 33 slots, but 36", "min_slots"),
    (spec(**PYRAMID, protect={"sinks": 4}, min_slots=48), 0.5, "as small as 33 slots, but 36", "min_slots"),
    (spec(**SNAP, protect={"recent": 100}), 0.9, "64 slots, but 100 are protected", "min_slots"),
    # files that are missing
    (spec(score="q_filters"), 0.2, "no weight file", "options.file"),
    (spec(score="q_filters", options={"file": "no.pt"}), 0.2, "no weight file 'no.pt'", "options.file"),
    (spec(score="kvp", options={"file": "/"}), 0.2, "no weight file '/'", "options.file"),
    ({"name": "mine", "extends": "trim_kv"}, 0.2, "no weight file", "options.file"),
    # extends
    (spec(extends="snapvk"), 0.2, "no policy named 'snapvk' in 'extends'", "did you mean 'snapkv'"),
    (spec(extends=5), 0.2, "bad value 5 in 'extends'", "name or a path"),
    (spec(extends=["h2o", "tova"]), 0.2, "bad value ['h2o', 'tova'] in 'extends'", "name or a path"),
    (spec(extends=None), 0.2, "bad value None in 'extends'", "name or a path"),
    (spec(extends="no.yaml"), 0.2, "bad value 'no.yaml' in 'extends': no such file", "relative"),
    (spec(extends="no/such.yml"), 0.2, "in 'extends': no such file", "relative"),
    ({"extends": "snapkv"}, 0.2, "key 'name' is missing", "has its own"),
    (spec(**SNAP, observe={"querys": 8}), 0.2, "unknown key 'observe.querys'", "did you mean 'queries'"),
    (spec(**SNAP, statistic=None), 0.2, "bad value in score", "needs statistic.keep"),
]

FILES: list[tuple[dict[str, str], str, str]] = [
    ({"a": "name: x\nname: y\n"}, "key 'name' is there twice, in lines 1 and 2", "docs/policy-files.md"),
    ({"a": "name: x\nprotect:\n  sinks: 1\n  sinks: 2\n"}, "key 'sinks' is there twice, in lines 3 and 4", "docs"),
    ({"a": "name: x\nprotect: {recent: 1, recent: 1}\n"}, "key 'recent' is there twice", "docs"),
    ({"a": "name: x\nextends: a.yaml\n"}, "'extends' runs in a circle: a.yaml -> a.yaml", "stand alone"),
    ({"a": "extends: b.yaml\n", "b": "extends: a.yaml\n"}, "circle: a.yaml -> b.yaml -> a.yaml", "stand alone"),
    (
        {"a": "extends: b.yaml\n", "b": "extends: c.yaml\n", "c": "extends: a.yaml\n"},
        "circle: a.yaml -> b.yaml -> c.yaml -> a.yaml",
        "stand alone",
    ),
    ({"a": "name: x\nextends: b.yaml\n", "b": "extends: c.yaml\n"}, "bad value 'c.yaml' in 'extends'", "relative"),
    ({"a": "name: x\nextends: b.yaml\n", "b": "extends: h20\n"}, "no policy named 'h20' in 'extends'", "'h2o'"),
    ({"a": "name: x\nextends: b.yaml\n", "b": "protekt: {}\n"}, "unknown key 'protekt'", "did you mean 'protect'"),
    ({"a": "name: x\nextends: b.yaml\n", "b": "[1]\n"}, "a policy file holds a mapping", "name: my_policy"),
    ({"a": "name: x\nextends: b.yaml\n", "b": "score: sum\nscore: mean\n"}, "key 'score' is there twice", "docs"),
    ({"a": "name: x\nprotect: &p {sinks: *p}\n"}, "cannot hold itself", "& and *"),
    ({"a": "name: x\nprotect: *p\n"}, "not valid YAML: found undefined alias", "docs"),
    ({"a": "name: x\nobserve: &o\n  queries: *o\n"}, "cannot hold itself", "& and *"),
    ({"a": "name: 2024-13-45\n"}, "not valid YAML", "docs"),
    ({"a": "name: x\n---\nname: y\n"}, "not valid YAML", "docs"),
    ({"a": "name: x\n? [1]\n: 2\n"}, "not valid YAML", "docs"),
    ({"a": "name: !!python/object:os.system x\n"}, "not valid YAML", "docs"),
    ({"a": "[" * 5000}, "not valid YAML", "docs"),
    ({"a": "name: no\n"}, "bad value False in 'name'", "string"),
    ({"a": "name: x\nextends: h2o\nweight: {floor: 1e-4}\n"}, "bad value '1e-4' in 'weight.floor'", "1.0e-4"),
    ({"a": "name: x\nseed: .nan\n"}, "bad value nan in 'seed'", "integer"),
]


def refused(policy: Any, budget: Any, what: str, fix: str) -> PolicyError:
    """Compiles with a bad policy: one error, of one line, that holds these words."""
    with pytest.raises(PolicyError) as caught:
        kvpass.compile(torch.nn.Linear(2, 2).eval(), policy, budget)
    error = caught.value
    assert what in error.what
    assert fix in error.hint
    assert len(error.what.splitlines()) == 1
    assert error.__cause__ is None
    return error


@pytest.mark.parametrize(("policy", "budget", "what", "fix"), CASES, ids=lambda v: str(v)[:40])
def test_bad_specs(policy, budget, what, fix, monkeypatch):
    monkeypatch.setattr("kvpass.pipeline.compose.Backend.__call__", untouchable)
    refused(policy, budget, what, fix)


@pytest.mark.parametrize(("files", "what", "fix"), FILES, ids=lambda v: str(v)[:40])
def test_bad_files(files, what, fix, monkeypatch, tmp_path: Path):
    monkeypatch.setattr("kvpass.pipeline.compose.Backend.__call__", untouchable)
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    assert str(tmp_path) in refused(tmp_path / "a.yaml", 0.2, what, fix).where


def test_there_are_enough_cases():
    """test_policy_spec.py has more."""
    assert len(CASES) + len(FILES) >= 110
    assert len({str(case[:2]) for case in CASES}) == len(CASES)


def test_what_extends_fills_in(tmp_path: Path):
    base, mine = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    base.write_text("extends: snapkv\nnotes: of the base\nweight: {by: l2, floor: 0.5}\n")
    mine.write_text("name: mine\nextends: base.yaml\npool: null\nweight: {after: 0.25}\nscope: 0.0\n")
    policy, snapkv = Policy.load(mine), Policy.load("snapkv")
    assert (policy.name, policy.notes, policy.paper) == ("mine", "", "")
    assert (policy.observe, policy.statistic, policy.protect) == (snapkv.observe, snapkv.statistic, snapkv.protect)
    assert policy.pool is None
    assert policy.weight is not None
    assert (policy.weight.by, policy.weight.floor, policy.weight.after) == ("l2", 0.5, 0.25)


def test_a_weight_file_starts_at_the_file_that_names_it(tmp_path: Path, monkeypatch):
    """Also when paths are relative, and when another file in another folder extends it."""
    (tmp_path / "shared").mkdir()
    torch.save({"filters": torch.zeros(1, 1, 4)}, tmp_path / "shared" / "w.pt")
    (tmp_path / "shared" / "base.yaml").write_text("name: base\nscore: q_filters\noptions: {file: w.pt}\n")
    (tmp_path / "mine.yaml").write_text("name: mine\nextends: shared/base.yaml\n")
    monkeypatch.chdir(tmp_path)
    for path in ("shared/base.yaml", "mine.yaml", tmp_path / "mine.yaml"):
        policy = Policy.load(path).with_budget(0.2)
        assert Path(str(policy.options["file"])).resolve() == tmp_path / "shared" / "w.pt"


@pytest.mark.parametrize("slots", [33, 40, 51, 52, 53, 64, 100, 200])
@pytest.mark.parametrize("share", [None, 0.3])
def test_the_least_of_a_pyramid_is_what_its_rule_gives(slots, share):
    """No layer of a model falls below what was checked; at some length one gets down to it, or to one more."""
    from kvpass.policy.check import smallest_budget

    asked = slots if share is None else share
    policy = Policy.load({"name": "mine", **PYRAMID, "min_slots": slots}).with_budget(asked)
    least = min(
        budget_of(rule_of(policy, layer, layers), seen)
        for layers in (2, 21)
        for layer in (layers - 1,)
        for seen in [*range(33, 1000), 5000]
        if seen > slots
    )
    assert smallest_budget(policy) <= least <= smallest_budget(policy) + 1


@pytest.mark.parametrize("name", names())
def test_every_preset_can_be_extended(name, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nextends: {name}\nmin_slots: 32\n")
    mine, own = Policy.load(path), Policy.load(name)
    assert (mine.score, mine.observe, mine.protect, mine.min_slots) == (own.score, own.observe, own.protect, 32)
