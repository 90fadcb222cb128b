"""The catalogue of built-in policies: what each reads, what that costs, where it comes from. Data for people."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from kvpass.kernels.attention.observation import Observation, emitted
from kvpass.kernels.codecs.storage import Storage, coded
from kvpass.kernels.rank.marks import Marks
from kvpass.kernels.rank.replay import Replay
from kvpass.kernels.rank.scored import Sample, Scoring
from kvpass.kernels.rank.scorers.registry import Scorer
from kvpass.kernels.rank.scorers.seen import NOT_FROM_GRAPH
from kvpass.kernels.rank.weights import Weight
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.bias import BIAS, biased
from kvpass.kernels.slots.statistics import Statistics
from kvpass.plan.rule import rule_of
from kvpass.policy.load import load, names, variants
from kvpass.policy.spec import Spec

HEADINGS = ("policy", "reads", "extra at prefill", "bytes/slot", "bits", "paper")
EXAMPLE_WIDTH = 64
EXAMPLE_BUDGET = 0.2
"""Rules hold a budget; this one is shown for policies that bring none."""


@dataclass(frozen=True)
class Row:
    """What a policy costs.

    Attributes:
        reads: what ranks its slots, in words.
        extra: work of a prefill of T tokens beside attention's own: `none`, `T` (each key, value or hidden state once),
            `w*T` (the last w queries' attention again), `T*T` (all attention again).
        bytes: of position, statistics and bias, for each slot of each KV head, beside K and V.
        bits: of each number of a key and of a value, scales counted, at a head dimension of `EXAMPLE_WIDTH`; `-`: held
            as the model has them; `9.5/-`: keys and values; `2.5 + whole`: beside the tokens that the budget has room
            for, which are whole too.
        notes: where it differs from what it is taken from.
    """

    name: str
    reads: str
    extra: str
    bytes: int
    bits: str
    paper: str
    source: str
    notes: str


def catalogue() -> list[Row]:
    """The built-in policies by name."""
    return [row_of(load(name)) for name in names()]


def row_of(policy: Spec) -> Row:
    """What a checked policy costs."""
    rule = example_rule(policy)
    size = 4 + sum(record.slot_bytes for record in rule)
    extra = " + ".join(_extra(rule)) or "none"
    reads = ", ".join(reads_of(rule))
    return Row(policy.name, reads, extra, size, _bits(rule), policy.paper, policy.source, policy.notes)


def example_rule(policy: Spec) -> Rule:
    """The rule that the ops get at the policy's own budget, or else at `EXAMPLE_BUDGET`."""
    alike = replace(policy, layers={})
    return rule_of(alike if policy.budget is not None else replace(alike, budget=EXAMPLE_BUDGET))


def _bits(rule: Rule) -> str:
    storage = rule[Storage]
    codecs = [storage.codec(half) for half in ("k", "v")]
    widths = [storage.held_width(half, EXAMPLE_WIDTH) for half in ("k", "v")]
    both = zip(codecs, widths, strict=True)
    held = [c.bytes(width, storage.scale_group) * 8 / EXAMPLE_WIDTH if c else None for c, width in both]
    words = ["-" if one is None else f"{one:.3g}" for one in held]
    said = words[0] if words[0] == words[1] else "/".join(words)
    return f"{said} + whole" if rule.demotes else said


def _attended(rule: Rule) -> bool:
    """Whether rows of attention are looked at after the attention itself."""
    return rule[Observation].queries != 0 and bool(emitted(rule) or rule[Scoring].windowed)


def reads_of(rule: Rule) -> list[str]:
    """What ranks the slots of a rule, in words."""
    observation, scoring, weight = rule[Observation], rule[Scoring], rule[Weight]
    found = []
    if _attended(rule):
        kind, count = "logits" if "logits" in scoring.reads else "attention", observation.queries
        whose = {-1: "all queries", 1: "the last query"}.get(count, f"the last {count} queries")
        decode = " and of generated tokens" if observation.decode != "none" and count > 0 else ""
        found.append(f"{kind} of {whose}{decode}")
    found += ["attention of the replayed prompt"] if rule[Replay].replay else []
    found += ["values", "output projection", "hidden states"] if rule[Replay].normed else []
    words = {"hidden": "hidden states", "queries": "unrotated queries"}
    found += [words.get(what, what) for what in scoring.reads if what not in NOT_FROM_GRAPH | {"rows", "logits"}]
    if weight.weight != "none" and "values" not in found:
        found.append("values")
    found += ["output projection"] if weight.projected else []
    found += ["marks"] if rule[Marks].marked else []
    found += ["chance"] if rule[Sample].sample_num or scoring.scorer == "random" else []
    return found or (["positions"] if rule.evicts else ["nothing"])


def _extra(rule: Rule) -> list[str]:
    found = list(dict.fromkeys(work for record in rule for work in record.work(rule)))
    return found or (["T"] if rule[Scoring].scorer or rule[Weight].weight != "none" else [])


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    paper = row.paper.removeprefix("https://arxiv.org/abs/") or "-"
    paper = urlsplit(paper).netloc.split(".")[-2] if "://" in paper else paper
    return row.name, row.reads, row.extra, str(row.bytes), row.bits, paper


def brief(cell: str) -> str:
    """A cell in few characters: `attn (32, steps)` for the last 32 queries and generated tokens."""
    short = (
        cell.replace(" + ", "+")
        .replace(" cosines", " cos")
        .replace("n*n*n", "n^3")
        .replace(" and of generated tokens", ", steps")
        .replace("the last query", "1 queries")
        .replace("attention of the replayed prompt", "replay")
        .replace("2nd prefill", "twice")
    )
    short = short.replace("values, output projection", "v W_O").replace("v W_O, hidden states", "v W_O, hidden")
    short = short.replace("unrotated queries", "queries")
    short = re.sub(r"of (?:the last )?(\w+) queries((?:, steps)?)", r"(\1\2)", short)
    return short.replace("attention", "attn")


def as_text(rows: list[Row]) -> str:
    """The table in columns, for a terminal or a pipe: at most 100 characters wide."""
    lines = [HEADINGS, *((row.name, *map(brief, cells(row)[1:])) for row in rows)]
    sizes = [max(len(line[at]) for line in lines) for at in range(len(HEADINGS))]
    return "\n".join("  ".join(map(str.ljust, line, sizes)).rstrip() for line in lines)


def as_markdown(rows: list[Row]) -> str:
    """The table and a paragraph for each policy, as docs/policies.md holds them."""
    out = [f"| {' | '.join(HEADINGS)} |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        name, reads, extra, size, bits, paper = cells(row)
        link = f"[{paper}]({row.paper})" if row.paper else ""
        out.append(f"| [`{name}`](#{name}) | {reads} | {extra} | {size} | {bits} | {link} |")
    for row in rows:
        spec = f"[spec](../kvpass/policy/presets/{row.name}.yaml)"
        out += ["", f"### {row.name}", f"* Taken from: {row.source} ({spec})"]
        out += [f"* Differs: {row.notes}"] if row.notes else []
    return "\n".join(out)


def emission(policy: Spec) -> list[str]:
    """What the ops of a policy compute and keep, in lines of words; the last are the rule itself, and those of layers
    that differ.
    """
    rule = example_rule(policy)
    own = policy.budget is not None
    whose = {-1: "all queries", 0: "no query"}.get(
        rule[Observation].queries, f"the last {rule[Observation].queries} queries"
    )
    computed = f"{', '.join(emitted(rule))}, of {whose}" if emitted(rule) and rule[Observation].queries else "nothing"
    kept = " + ".join(["position", *rule[Statistics].stats, *([BIAS] if biased(rule) else [])])
    return [
        f"a multi-token call emits: {computed}",
        f"a one-token call does with its row: {rule[Observation].decode}",
        f"each slot keeps: {kept}, {4 + sum(record.slot_bytes for record in rule)} bytes beside K and V",
        *([f"keys and values are held in {_bits(rule)} bits a number"] if coded(rule) else []),
        *(["all tokens stay: the budget is of those that are held whole as well"] if rule.demotes else []),
        f"rule at budget {policy.budget if own else EXAMPLE_BUDGET}: {rule.encode()}",
        *(f"rule of layers {key}: {example_rule(other).encode()}" for key, other in variants(policy).items()),
    ]


def scorer_text(scorer: Scorer) -> str:
    """A scorer with its options, what it reads and what it says of itself."""
    options = ", ".join(f"{name}={value!r}" for name, value in scorer.options.items())
    reads = ", ".join(scorer.reads) or "positions"
    later = "a generated token gets its own score" if scorer.pointwise else "generated tokens stay longest"
    said = textwrap.fill(scorer.about, 100, initial_indent="    ", subsequent_indent="    ")
    return f"{scorer.name}({options})\n    reads {reads}; {later}\n{said}"
