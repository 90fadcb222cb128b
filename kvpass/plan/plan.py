"""Policy x SiteTable -> Plan: the committed decision about one graph, as data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from kvpass.errors import PolicyError
from kvpass.graph.angles import positions_of
from kvpass.graph.calls import call_name, example, operand
from kvpass.graph.miss import Miss
from kvpass.graph.output_projection import OutputProjection, output_projection
from kvpass.graph.projections import block_input
from kvpass.graph.rope import Rotation, rotation, unrounded
from kvpass.kernels.after_call.reindex import Reindex
from kvpass.kernels.codecs.storage import coded, fit_fields
from kvpass.kernels.exits.record import Merge
from kvpass.kernels.exits.refit import Refit
from kvpass.kernels.rank.layer import Layer
from kvpass.kernels.rank.pyramid import Pyramid
from kvpass.kernels.rank.replay import Replay
from kvpass.kernels.rank.scored import Scoring
from kvpass.kernels.rank.scorers.seen import NOT_FROM_GRAPH
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rank.weights import Weight
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.ragged import Ragged
from kvpass.plan.byte_budget import Entry
from kvpass.plan.on_ranks import heads_elsewhere, on_ranks
from kvpass.plan.rule import rule_of
from kvpass.plan.steps import planned_inputs, planned_steps
from kvpass.policy.files import check_fit
from kvpass.policy.spec import Spec
from kvpass.runtime.sharded import Sharded
from kvpass.runtime.step import Moment, PlannedStep, SharedInput
from kvpass.sites.site import Site
from kvpass.sites.table import Decline, SiteTable
from kvpass.terms import Layout, Phase

OPS = {
    Phase.PREFILL: ("prefill_attend", "score_slots", "select_slots", "compact_slots"),
    Phase.EXTEND: ("join_slots", "prefill_attend", "score_slots", "select_slots", "compact_slots"),
    Phase.DECODE: ("decode_attend",),
}
"""The ops that replace a site, in order."""


@dataclass(frozen=True)
class SitePlan:
    """What happens to one site: `rule` says what its ops observe and how they choose."""

    site: Site
    rule: Rule

    @property
    def ops(self) -> tuple[str, ...]:
        """Names of the ops that replace the site, in order."""
        ops = list(OPS[self.site.phase])
        if self.windowed and self.site.phase is not Phase.DECODE:
            ops.insert(ops.index("score_slots"), "window_rows")
        if self.replays:
            ops.insert(ops.index("score_slots"), "replay_scores")
        if self.merges and self.site.phase is not Phase.DECODE:
            ops += ["merge_slots"]
        if self.refits and self.site.phase is not Phase.DECODE:
            ops += ["refit_slots"]
        if coded(self.rule) and self.site.phase is not Phase.DECODE:
            ops += ["choose_whole" if self.rule.demotes else "keep_whole"]
            if fit_fields(self.rule):
                behind = ops.index("prefill_attend") + 1
                ops[behind:behind] = ["fit_slots", "encode_fitted"]
            elif self.site.phase is Phase.PREFILL:
                ops.insert(0, "encode_slots")
        return ("arrivals", *ops) if self.arrives and self.site.phase is Phase.DECODE else tuple(ops)

    @cached_property
    def projection(self) -> OutputProjection | None:
        """Where the rule's value weight, or its replay, finds the output projection; None if it reads none."""
        core, dims = self.site.core, self.site.dims
        if not self.projected or core.tiled:
            return None
        return output_projection(core.node, int(dims["Hq"]), int(dims["Dv"]))

    @cached_property
    def hidden(self) -> fx.Node | None:
        """The hidden states that the rule's scorer, or its replay, reads; None if it reads none."""
        read = "hidden" in self.rule[Scoring].reads or self.rule[Replay].normed
        return block_input(self.site.value.update.new) if read else None

    @cached_property
    def rotation(self) -> Rotation | None:
        """The rotation of the queries, for a scorer that reads them before it; None if it reads none."""
        core = self.site.core
        plain = core.axes.q == "BHSD" and not core.tiled
        return rotation(core.q) if "queries" in self.rule[Scoring].reads and plain else None

    @cached_property
    def key_rotation(self) -> Rotation | None:
        """The rotation of the new keys, for a rule that turns them again; None if it does not."""
        half = self.site.key
        new: Any = half.update.new
        if half.layout == Layout.BTHD:
            new = operand(new) if call_name(new) == "transpose" else None
        found = rotation(new) if self.rule[Reindex].reindex and isinstance(new, fx.Node) else None
        # angles of half precision are too coarse to tell one position from the next
        return found if found is None or example(unrounded(found.cos)).dtype is torch.float32 else None

    @cached_property
    def key_positions(self) -> tuple[list[fx.Node], bool] | None:
        """Nodes that may be the positions that new keys are rotated by, and whether they are looked up in a table; None
        if the angles cannot be computed from the graph's inputs: they depend on what the graph itself changes.
        """
        if self.key_rotation is None:
            return None
        try:
            return positions_of(self.key_rotation, self.site.dims["S"])
        except Miss:
            return None

    @property
    def windowed(self) -> bool:
        """Whether the scorer reads the rows of the observation window."""
        return self.rule[Scoring].windowed

    @property
    def merges(self) -> bool:
        """Whether calls of several tokens merge what they evict, inside the graph."""
        return self.rule[Merge].calls and not self.rule[ShareOut].share

    @property
    def refits(self) -> bool:
        """Whether calls of several tokens fit what stays."""
        return self.rule[Refit].refit_queries > 0

    @property
    def projected(self) -> bool:
        """Whether the rule reads the output projection."""
        return self.rule[Weight].projected or self.rule[Replay].normed

    @property
    def replays(self) -> bool:
        """Whether calls may repeat tokens that slots hold, which get scores by it."""
        return self.rule[Replay].replay > 0 and self.site.phase is Phase.EXTEND

    @property
    def arrives(self) -> bool:
        """Whether a generated token's slot starts with more than zeros."""
        return any(record.arrives for record in self.rule)


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
    rules = [
        on_ranks(policy, rule_of(policy, at, len(sites), _entry(site)), site, part) for at, site in enumerate(sites)
    ]
    ruled = tuple(zip(sites, rules, strict=True))
    planned = tuple(SitePlan(site, rule) for site, rule in ruled)
    for one in planned:
        _check(policy, one)
        _check_files(policy, one, len(sites), part)
    return Plan(policy, planned, table.declined, planned_steps(policy, ruled), planned_inputs(ruled), part)


def _entry(site: Site) -> Entry:
    """What an unmodified cache of a site holds for a token in one head."""
    return Entry(int(site.dims["D"]), int(site.dims["Dv"]), site.dtype)


def _check(policy: Spec, planned: SitePlan) -> None:
    """What a policy asks of a site and the site cannot give.

    Raises:
        PolicyError: naming the site.
    """
    for broken, asked, fix in _unmet(planned):
        if broken:
            where = f"{planned.site.name}, {planned.site.source}"
            raise PolicyError(f"policy {policy.name!r} {asked}", where=where, hint=fix)


def _check_files(policy: Spec, planned: SitePlan, layers: int, part: Sharded | None) -> None:
    """Raises PolicyError if the policy's weights or shares are for another model."""
    site, hidden = planned.site, planned.hidden
    sizes = {letter: int(site.dims[letter]) for letter in ("Hkv", "D", "Dv") if isinstance(site.dims[letter], int)}
    if part is not None and "Hkv" in sizes and heads_elsewhere(site, part):
        sizes["Hkv"] *= part.ranks
    if hidden is not None:
        sizes["size"] = int(example(hidden).shape[-1])
    check_fit(policy.name, planned.rule, {**sizes, "layers": layers}, f"{site.name}, {site.source}")


def _unmet(planned: SitePlan) -> Iterator[tuple[bool, str, str]]:
    """Whether something is missing, what was asked, and the fix."""
    site, rule = planned.site, planned.rule
    reads = [word for word in rule[Scoring].reads if word not in NOT_FROM_GRAPH]
    reads += ["weight"] if rule[Weight].weight != "none" else []
    shared = site.core.latent is not None or site.mixed is not None
    what = "keeps latents instead of keys and values" if site.core.latent else "keeps all heads side by side"
    asked = "turns keys to new positions" if rule[Reindex].reindex else "gives heads budgets of their own"
    asked = f"reads {' and '.join(reads)}" if reads else asked
    fix = "choose a policy of attention's statistics, e.g. h2o or snapkv"
    kept_apart = bool(reads) or rule[Ragged].ragged or rule[Reindex].reindex
    yield shared and kept_apart, f"{asked}, but this attention {what}", fix
    fix = "set evicted: drop for these layers"
    yield shared and bool(rule[Merge].merge_into), f"merges what it evicts, but this attention {what}", fix
    yield shared and planned.refits, f"fits slots to what it evicts, but this attention {what}", fix
    fix = "leave `store` and `evicted` out for these layers, or use store: dense and evicted: drop"
    yield site.core.latent is not None and bool(coded(rule)), "stores codes, but this attention keeps latents", fix
    asked = "weighs values by the output projection, which was not found behind the attention"
    fix = "set weight.by: l1, which needs no projection; gates and norms in between cannot be read through"
    asked = "divides by norms of hidden states" if rule[Replay].normed else asked
    fix = "set options.normed: false" if rule[Replay].normed else fix
    yield planned.projected and planned.projection is None, asked, fix
    asked = "reads the block's hidden states, which were not found above its values"
    fix = "choose a policy that reads keys or attention; projections of several tensors cannot be read"
    needed = "hidden" in rule[Scoring].reads or rule[Replay].normed
    yield needed and planned.hidden is None, asked, fix
    asked = "reads queries before their rotation, and none of the usual form was found (RoPE over whole heads, entry i "
    fix = "choose a policy that reads keys or attention, e.g. keydiff or snapkv"
    yield "queries" in rule[Scoring].reads and planned.rotation is None, f"{asked}with entry i + D / 2)", fix
    unfound = rule[Reindex].reindex and site.phase is not Phase.DECODE and planned.key_rotation is None
    asked = "turns keys to new positions, and none of the usual rotation was found (float32, RoPE over whole heads, "
    fix = "choose a policy with positions: kept, e.g. streaming_llm"
    yield unfound, f"{asked}entry i with entry i + D / 2)", fix
    changing = rule[Reindex].reindex and site.phase is not Phase.DECODE and planned.key_positions is None
    yield changing, "turns keys to new positions, but this model changes its rotary frequencies with the length", fix
    asked, fix = "shares the budget out over layers, but this graph holds one", "set allocate.layers: uniform"
    over_layers = bool(rule[Pyramid].beta) or rule[ShareOut].share in ("model", "preference")
    yield over_layers and rule[Layer].layers < 2, asked, f"avoid graph breaks between layers, or {fix}"
