"""Policy x SiteTable -> Plan: the committed decision about one graph, as data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from kvpass.graph.calls import example
from kvpass.kernels.rule import Rule
from kvpass.plan.byte_budget import Entry
from kvpass.plan.on_ranks import heads_elsewhere, on_ranks
from kvpass.plan.rule import rule_of
from kvpass.plan.site_plan import SitePlan
from kvpass.plan.steps import planned_inputs, planned_steps
from kvpass.plan.unmet import check_met
from kvpass.policy.files import check_fit
from kvpass.policy.spec import Spec
from kvpass.runtime.sharded import Sharded
from kvpass.runtime.step import Moment, PlannedStep, SharedInput
from kvpass.sites.site import Site
from kvpass.sites.table import Decline, SiteTable


@dataclass(frozen=True)
class Plan:
    """What happens to one graph.

    Attributes:
        sites: planned.
        dense: sites left dense, with their reasons.
        steps: what is done before and after each call, outside the graph.
        inputs: what the rewritten graph takes beside the sites' state, for all of them.
        part: of the model that this process has; None: all of it.
    """

    policy: Spec
    sites: tuple[SitePlan, ...]
    dense: tuple[Decline, ...]
    steps: tuple[PlannedStep, ...] = ()
    inputs: tuple[SharedInput, ...] = ()
    part: Sharded | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            **({"part": str(self.part)} if self.part is not None else {}),
            "policy": self.policy.to_dict(),
            "policy_fingerprint": self.policy.fingerprint,
            "sites": [{**p.site.to_dict(), "ops": list(p.ops), "rule": p.rule.encode()} for p in self.sites],
            "dense": [d.to_dict() for d in self.dense],
            "steps": [self._described(one) for one in self._in_order()],
            "inputs": [one.name for one in self.inputs],
        }

    def _in_order(self) -> list[PlannedStep]:
        """The steps as they run."""
        return [one for moment in Moment for one in self.steps if one.step.moment is moment]

    def _described(self, one: PlannedStep) -> dict[str, Any]:
        step, names = one.step, [self.sites[at].site.name for at in one.sites]
        return {"step": step.name, "moment": step.moment.value, "about": step.about, "sites": names}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @property
    def fingerprint(self) -> str:
        """Short hash of the whole decision."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def __str__(self) -> str:
        budget = f"policy {self.policy.name}, budget {self.policy.asked}"
        part = f", {self.part}, its heads alone" if self.part is not None else ""
        lines = [f"plan {self.fingerprint}: {budget}, {len(self.sites)} site(s){part}"]
        lines += [
            f"  {p.site.name}: {p.site.phase.value} -> {' > '.join(p.ops)}  [{p.rule.encode()}]" for p in self.sites
        ]
        lines += [f"  dense {d.site}: {d.reason.value}" for d in self.dense]
        for one in self._in_order():
            some = "" if len(one.sites) == len(self.sites) else f" for {len(one.sites)} of the sites"
            lines.append(f"  {one.step.moment.value}: {one.step.name}{some}  [{one.step.about}]")
        return "\n".join(lines)


def plan(policy: Spec, table: SiteTable, part: Sharded | None = None) -> Plan:
    """Decide for every site; pure, touches no graph.

    Args:
        policy: checked, with its budget.
        table: of one graph.
        part: of the model that this process has; None: all of it.

    Raises:
        PolicyError: the policy asks what a site, or a part of a model, cannot give.
    """
    sites = tuple(table)
    same: dict[Rule, Rule] = {}  # equal rules are one object: each call of the graph asks those of all sites
    rules = [
        on_ranks(policy, rule_of(policy, at, len(sites), _entry(site)), site, part) for at, site in enumerate(sites)
    ]
    rules = [same.setdefault(rule, rule) for rule in rules]
    ruled = tuple(zip(sites, rules, strict=True))
    planned = tuple(SitePlan(site, rule) for site, rule in ruled)
    for one in planned:
        check_met(policy, one)
        _check_files(policy, one, len(sites), part)
    return Plan(policy, planned, table.declined, planned_steps(policy, ruled), planned_inputs(ruled), part)


def _entry(site: Site) -> Entry:
    """What an unmodified cache of a site holds for a token in one head."""
    return Entry(int(site.dims["D"]), int(site.dims["Dv"]), site.dtype)


def _check_files(policy: Spec, planned: SitePlan, layers: int, part: Sharded | None) -> None:
    """Raises PolicyError if the policy's weights or shares are for another model."""
    site, hidden = planned.site, planned.hidden
    sizes = {letter: int(site.dims[letter]) for letter in ("Hkv", "D", "Dv") if isinstance(site.dims[letter], int)}
    if part is not None and "Hkv" in sizes and heads_elsewhere(site, part):
        sizes["Hkv"] *= part.ranks
    if hidden is not None:
        sizes["size"] = int(example(hidden).shape[-1])
    check_fit(policy.name, planned.rule, {**sizes, "layers": layers}, f"{site.name}, {site.source}")
