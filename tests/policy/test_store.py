"""What a policy file says of its slots and of bytes: both spellings, what is refused, what the command prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from kvpass.kernels.codecs.storage import Storage, fit_fields
from models.refused import refused

from kvpass.api.cli import main
from kvpass.plan.rule import rule_of
from kvpass.policy.layers import of_layer
from kvpass.policy.policy import Policy
from kvpass.policy.spec import Store

KNOWN = (
    "known: dense, int8, int4, int3, int2, int8_symmetric, int4_symmetric, fp8_e4m3, fp8_e5m2, float16, turbo4, "
    "turbo3, turbo2, ternary, mixed_2_1, csr8, csr4"
)
SORTED = {"k": "mixed_2_1", "rotate": "none", "fit_k": "spread"}
TURNED = "streaming_llm_reindexed"


def spec(**fields: Any) -> dict[str, Any]:
    return {"name": "mine", "extends": "h2o", **fields}


BAD: list[tuple[Any, Any, str, str]] = [
    (spec(store="itn4"), 0.2, "bad value in store.k", f"did you mean 'int4'? {KNOWN}"),
    (spec(store={"v": "fp8"}), 0.2, "bad value in store.v", "did you mean 'fp8_e"),
    (spec(store={"k": "zip"}), 0.2, "bad value in store.k", KNOWN),
    (spec(store=4), 0.2, "bad value 4 in 'store'", "mapping"),
    (spec(store=["int4"]), 0.2, "in 'store'", "mapping"),
    (spec(store={"keys": "int4"}), 0.2, "unknown key 'store.keys'", "valid here: k, v, rotate, group"),
    (spec(store={"rotate": "hadamart"}), 0.2, "in 'store.rotate'", "'hadamard'"),
    (spec(store={"k": "int4", "group": 0}), 0.2, "bad value in store.group", "e.g. 64"),
    (spec(store={"k": "int4", "group": 6.5}), 0.2, "bad value in store.group", "or a share"),
    (spec(store={"k": "int4", "group": "all"}), 0.2, "in 'store.group'", "integer"),
    (spec(store={"k": "int4", "group": 2**40}), 0.2, "bad value in store.group", "up to"),
    (spec(store={"k": "int4", "residual": -1}), 0.2, "bad value in store.residual", "0 or more"),
    (spec(store={"v": "int4", "sinks": -1}), 0.2, "bad value in store.sinks", "0 or more"),
    ({"store": "itn4"}, None, "bad value in store.k", "did you mean 'int4'"),
    ({"store": "int4"}, 0.2, "policy 'int4' keeps everything", "evicting policy"),
    ({"store": "int4", "extends": "h2o"}, 0.2, "key 'name' is missing", "has its own"),
    (spec(extends=TURNED, store="int4"), 0.2, "bad value in positions", "store.k: dense"),
    (spec(extends="cascading", store={"k": "int8"}), 0.2, "bad value in positions", "store.k: dense"),
    (spec(extends=TURNED, layers={"0": {"store": "int4"}}), 0.2, "bad value in positions", "store.k: dense"),
    (spec(layers={"0": {"store": "in4"}}), 0.2, "bad value in store.k", "did you mean 'int4'"),
    (spec(layers={"0": {"store": {"group": 0}}}), 0.2, "bad value in store.group", "e.g. 64"),
    (spec(store={"k": "int4", "fit_k": "ballance"}), 0.2, "in 'store.fit_k'", "'balance'"),
    (spec(store={"v": "int4", "fit_v": "balance"}), 0.2, "in 'store.fit_v'", "'range'"),
    (spec(store={"v": "int4", "fit_k": "balance"}), 0.2, "bad value in store.fit_k", "set store.k"),
    (spec(store={"k": "int4", "fit_v": "range"}), 0.2, "bad value in store.fit_v", "set store.v"),
    (spec(store={"k": "float16", "fit_k": "channels"}), 0.2, "bad value in store.rotate", "rotate: none"),
    (spec(store={"k": "float16", "channels": 0.0}), 0.2, "bad value in store.channels", "e.g. 0.6"),
    (spec(store={"k": "float16", "channels": 1.5}), 0.2, "bad value in store.channels", "e.g. 0.6"),
    (spec(store="mixed_2_1"), 0.2, "bad value in store.k", "fit_k: spread"),
    (spec(store={**SORTED, "v": "mixed_2_1"}), 0.2, "bad value in store.v", "ternary"),
    (spec(store={**SORTED, "k": "int2"}), 0.2, "bad value in store.fit_k", "mixed_2_1"),
    (spec(store={"k": "csr8", "rotate": "none"}), 0.2, "bad value in store.fit_k", "fit_k: atoms"),
    (spec(store={"v": "int4", "fit_v": "atoms"}), 0.2, "bad value in store.fit_v", "store.v: csr8"),
    (spec(store={"k": "csr4", "fit_k": "atoms"}), 0.2, "bad value in store.rotate", "rotate: none"),
    (spec(store={"atoms": 0}), 0.2, "bad value in store.atoms", "e.g. 256"),
    (spec(store={**SORTED, "rotate": "hadamard"}), 0.2, "bad value in store.rotate", "rotate: none"),
    (spec(unit="bytes", budget=100), None, "bad value in unit", "give a fraction"),
    (spec(unit="bytes"), 100, "bad value in unit", "give a fraction"),
    (spec(budget="20% bytes"), 100, "bad value in unit", "give a fraction"),
    (spec(budget="20% bytes", layers={"0": {"budget": 64}}), None, "bad value in unit", "give a fraction"),
    (spec(unit="words"), 0.2, "in 'unit'", "'bytes'"),
    (spec(extends="pyramidkv", unit="bytes"), 0.2, "bad value in unit", "unit: tokens"),
    ("pyramidkv", "20% bytes", "bad value in unit", "unit: tokens"),
    ("corm", "20% bytes", "bad value in unit", "unit: tokens"),
    ("h2o", "0% bytes", "above 0 and at most at 1.0", "keeps a fifth"),
    ("h2o", "120% bytes", "above 0 and at most at 1.0", "keeps a fifth"),
    ("h2o", "20% bites", "not str", "budget=0.2"),
    ("h2o", "bytes", "not str", "budget=0.2"),
    ("full", "50% bytes", "policy 'full' keeps everything", "evicting policy"),
    (spec(budget="much"), None, "bad value 'much' in 'budget'", "valid"),
]


@pytest.mark.parametrize(("policy", "budget", "what", "fix"), BAD, ids=lambda v: str(v)[:50])
def test_what_is_refused(policy: Any, budget: Any, what: str, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(policy, budget, what, fix, monkeypatch)


def test_one_word_is_both_halves() -> None:
    said, written = (Policy.load(spec(store=held)) for held in ("int4", {"k": "int4", "v": "int4"}))
    assert said == written
    assert said.store == Store("int4", "int4", "hadamard", 64, 32, 4)
    assert said.fingerprint == written.fingerprint != Policy.load(spec()).fingerprint
    assert Policy.load(spec(store="dense")).fingerprint == Policy.load(spec()).fingerprint


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"store": "int4"}, "int4"),
        ({"store": {"k": "int8", "v": "int8", "group": 32}}, "int8"),
        ({"store": {"k": "int8", "v": "int4"}}, "k int8, v int4"),
        ({"store": {"v": "int2"}}, "k dense, v int2"),
        ({"store": "int4", "name": "own"}, "own"),
    ],
    ids=str,
)
def test_a_store_alone_is_a_policy_that_keeps_all(data: dict[str, Any], name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    for policy in (Policy.load(data), Policy.load(tmp_path / "mine.yaml")):
        assert (policy.name, policy.budget, policy.keeps_all) == (name, 1.0, True)
        assert policy.with_budget(None).store == policy.store


def test_what_extends_makes_of_a_store(tmp_path: Path) -> None:
    """One word or a mapping below, a word, a mapping or null above."""
    for base, own, held in [
        ("int4", {"residual": 0}, Store("int4", "int4", residual=0)),
        ("int4", {"k": "int8"}, Store("int8", "int4")),
        ("int4", "dense", Store()),
        ("int4", None, Store()),
        ("int4", "int2", Store("int2", "int2")),
        ({"k": "int4", "group": 16}, {"v": "int8"}, Store("int4", "int8", group=16)),
        ({"k": "int4", "group": 16}, "dense", Store()),
        ({"k": "int4", "group": 16}, {"k": None}, Store(group=16)),
    ]:
        path = tmp_path / "base.yaml"
        path.write_text(yaml.safe_dump({"name": "base", "extends": "snapkv", "store": base}))
        assert Policy.load(path).store != Store()
        mine = Policy.load({"name": "mine", "extends": str(path), "store": own})
        assert mine.store == held
        assert mine.score == Policy.load("snapkv").score


def test_layers_are_taken_out_of_fits() -> None:
    """`store: dense` over a preset with fits leaves nothing of them in a layer's rule."""
    for name in ("kivi", "think", "vidkv", "csr"):
        policy = Policy.load({"name": "mine", "extends": name, "layers": {"0": {"store": "dense"}}})
        policy = policy.with_budget(None if policy.keeps_all else 0.2)
        assert fit_fields(rule_of(policy, 1, 4))
        assert not rule_of(policy, 0, 4)[Storage].coded
        assert rule_of(policy, 0, 4)[Storage] == Storage()


def test_layers_hold_what_they_say() -> None:
    policy = Policy.load(spec(store="int4", layers={"0": {"store": "dense"}, "-1": {"store": {"k": "int8"}}}))
    policy = policy.with_budget(0.2)
    held = [of_layer(policy, at, 4).store for at in range(4)]
    assert held == [Store(), policy.store, policy.store, Store("int8", "int4")]


@pytest.mark.parametrize(
    ("text", "share", "unit"),
    [
        ("20% bytes", 0.2, "bytes"),
        ("20 % of bytes", 0.2, "bytes"),
        ("12.5% bytes", 0.125, "bytes"),
        ("20%", 0.2, "tokens"),
        ("20% tokens", 0.2, "tokens"),
        ("100% bytes", 1.0, "bytes"),
    ],
)
def test_budgets_in_words(text: str, share: float, unit: str) -> None:
    for policy in (Policy.load("h2o").with_budget(text), Policy.load(spec(budget=text)).with_budget(None)):
        assert (policy.budget, policy.unit) == (share, unit)


def test_the_unit_stays_until_another_is_said(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text("name: base\nextends: h2o\nbudget: 20% bytes\n")
    base = Policy.load(path)
    found = [base.with_budget(budget) for budget in (None, 0.3, "30%", "30% tokens")]
    assert [(p.budget, p.unit) for p in found] == [(0.2, "bytes"), (0.3, "bytes"), (0.3, "bytes"), (0.3, "tokens")]
    above = [Policy.load(spec(extends=str(path), budget=own)) for own in (0.3, "30% tokens")]
    assert [(p.budget, p.unit) for p in above] == [(0.3, "bytes"), (0.3, "tokens")]
    assert Policy.load(spec(extends=str(path), budget=64, unit="tokens")).budget == 64


def test_show_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, broken = tmp_path / "mine.yaml", tmp_path / "broken.yaml"
    file.write_text("name: mine\nextends: h2o\nstore: {k: int8, v: int4, group: 16}\nbudget: 20% bytes\n")
    broken.write_text("store: itn4\n")
    assert main(["policies", "show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "store:\n  k: int8\n  v: int4\n  rotate: hadamard\n  group: 16\n" in shown
    assert "k_as=int8 v_as=int4 scale_group=16 rotated=1 residual=32 whole_sinks=4" in shown
    (tmp_path / "shown.yaml").write_text(shown)
    assert Policy.load(tmp_path / "shown.yaml") == Policy.load(file)
    assert main(["policies", "show", "h2o", "--budget", "30% bytes"]) == 0
    assert "budget: 0.3\nunit: bytes\n" in capsys.readouterr().out
    assert main(["policies", "check", str(file)]) == 0
    assert "mine.yaml: ok, policy 'mine' with budget 20% bytes" in capsys.readouterr().out
    assert main(["policies", "check", str(file), "--budget", "100"]) == 1
    assert "bad value in unit" in capsys.readouterr().out
    assert main(["policies", "check", str(broken), str(file), "--budget", "10% tokens"]) == 1
    said = capsys.readouterr()
    assert "broken.yaml: PolicyError: policy 'itn4': bad value in store.k" in said.out
    assert "with budget 0.1\n" in said.out
    assert "did you mean 'int4'" in said.err
