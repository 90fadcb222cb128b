"""Plans: pure decisions about a site table."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from kvpass.kernels.rule import OPS_VERSION
from models import plain
from models.graphs import table

from kvpass.plan.plan import plan
from kvpass.plan.site_plan import OPS
from kvpass.policy.policy import Policy
from kvpass.sites.table import SiteTable
from kvpass.terms import Phase


def sites() -> SiteTable:
    return table(plain.make(plain.GroupedDecoder), plain.tokens(1, 40), None)


def planned(policy: str = "h2o", budget: float = 0.2, found: SiteTable | None = None):
    return plan(Policy.load(policy).with_budget(budget), found if found is not None else sites())


def test_every_site_gets_the_rule_and_its_phases_ops():
    made = planned()
    assert [p.site.name for p in made.sites] == ["blocks.0", "blocks.1"]
    assert {p.rule.encode() for p in made.sites} == {
        f"ops={OPS_VERSION} stats=sum queries=-1 decode=add score=sum recent_num=1 recent_den=2 den=5 floor=64"
    }
    assert all(p.ops == OPS[Phase.PREFILL] for p in made.sites)


def test_declined_sites_stay_dense():
    found = table(plain.make(plain.GroupedDecoder).train(), plain.tokens(1, 40), None)
    assert planned(found=replace(found, sites=(), declined=("x",))).dense == ("x",)  # type: ignore[arg-type]


def test_json_comes_back():
    made = planned()
    data = json.loads(made.to_json())
    assert data["policy"]["name"] == "h2o"
    assert data["policy_fingerprint"] == made.policy.fingerprint
    assert [row["site"] for row in data["sites"]] == ["blocks.0", "blocks.1"]
    assert data["sites"][0]["dims"] == {"B": "1", "Hq": "4", "Hkv": "2", "S": "40", "D": "8", "Dv": "8"}
    assert data["sites"][0]["ops"] == list(OPS[Phase.PREFILL])
    assert data["dense"] == []


def test_fingerprints():
    found = sites()
    assert planned(found=found).fingerprint == planned(found=sites()).fingerprint
    others = [planned(found=found), planned(budget=0.3, found=found), planned("tova", found=found)]
    assert len({p.fingerprint for p in others}) == 3


@pytest.mark.parametrize("phase", list(Phase))
def test_every_phase_has_ops(phase):
    assert OPS[phase][-1] in ("decode_attend", "compact_slots")
