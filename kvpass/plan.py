"""Policy x SiteTable -> Plan: the committed decision about one graph, as data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from kvpass.kernels.rule import Rule
from kvpass.policy.rule import rule_of
from kvpass.policy.spec import Policy
from kvpass.site import Decline, Site, SiteTable
from kvpass.terms import Phase

OPS = {
    Phase.PREFILL: ("prefill_attend", "score_slots", "select_slots", "compact_slots"),
    Phase.EXTEND: ("join_slots", "prefill_attend", "score_slots", "select_slots", "compact_slots"),
    Phase.DECODE: ("decode_attend",),
}
"""The ops that replace a site, in order."""


@dataclass(frozen=True)
class SitePlan:
    """What happens to one site."""

    site: Site
    rule: Rule

    @property
    def ops(self) -> tuple[str, ...]:
        return OPS[self.site.phase]


@dataclass(frozen=True)
class Plan:
    """What happens to one graph: planned sites, and sites left dense with their reasons."""

    policy: Policy
    sites: tuple[SitePlan, ...]
    dense: tuple[Decline, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.to_dict(),
            "policy_fingerprint": self.policy.fingerprint,
            "sites": [{**p.site.to_dict(), "ops": list(p.ops), "rule": p.rule.encode()} for p in self.sites],
            "dense": [d.to_dict() for d in self.dense],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @property
    def fingerprint(self) -> str:
        """Short hash of the whole decision."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def __str__(self) -> str:
        budget = f"policy {self.policy.name}, budget {self.policy.budget}"
        lines = [f"plan {self.fingerprint}: {budget}, {len(self.sites)} site(s)"]
        lines += [
            f"  {p.site.name}: {p.site.phase.value} -> {' > '.join(p.ops)}  [{p.rule.encode()}]" for p in self.sites
        ]
        lines += [f"  dense {d.site}: {d.reason.value}" for d in self.dense]
        return "\n".join(lines)


def plan(policy: Policy, table: SiteTable) -> Plan:
    """Decide for every site; pure, touches no graph.

    Args:
        policy: checked, with its budget.
        table: of one graph.
    """
    rule = rule_of(policy)
    return Plan(policy, tuple(SitePlan(site, rule) for site in table), table.declined)
