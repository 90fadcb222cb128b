"""What is tried: built-in policies, files of the user's, and settings laid over those that do best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvpass.errors import PolicyError
from kvpass.policy.load import names
from kvpass.policy.policy import Policy
from kvpass.policy.shorthand import share

FIRST = (
    "turbo",
    "snapkv",
    "snapkv_int4",
    "layer_defensivekv",
    "expected_attention",
    "kvzip",
    "keydiff",
    "roco",
    "criticalkv",
    "ada_snapkv",
    "compactor",
    "kivi",
    "h2o_int8",
    "critical_ada",
    "am_fast",
    "kvzip_plus",
    "vatp",
    "r_kv",
    "keyformer",
    "tova",
    "cascading",
    "scissorhands",
    "nacl",
    "chunkkv",
)
"""Of different kinds, and good on one model or another, before the rest: the clock may end a search in between."""

SLOW = ("csr",)

UNTRIED = {"full", "random", "judge_q"}
"""The full cache; what every policy must beat; and one whose probes the caller would have to append."""

KINDS = {"one-pass": "one pass, whole numbers", "replay": "prompt read twice", "codes": "held as codes"}
"""What users pay with: nothing, a second prefill, or time in every step for reading codes."""

MOVES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sinks 4", {"protect": {"sinks": 4}}),
    ("int4", {"store": "int4"}),
    ("layers flat", {"allocate": {"layers": "flat", "heads": "uniform", "safeguard": 0.0}}),
    ("heads flat", {"allocate": {"layers": "uniform", "heads": "flat", "safeguard": 0.2}}),
    ("int8", {"store": "int8"}),
    ("values weigh", {"weight": {"by": "vo_l1", "after": 0.5}}),
    ("queries 128", {"observe": {"queries": 128}}),
    ("queries 16", {"observe": {"queries": 16}}),
    ("fitted", {"evicted": {"refit": {"ridge": 0.1}}}),
    ("pool 7", {"pool": {"kind": "max", "size": 7}}),
    ("no pool", {"pool": None}),
    ("recent 16", {"protect": {"recent": 16}}),
    ("recent 30 %", {"protect": {"recent": 0.3}}),
    ("safeguard 0", {"allocate": {"safeguard": 0.0}}),
    ("safeguard 0.5", {"allocate": {"safeguard": 0.5}}),
    ("k int8, v int4", {"store": {"k": "int8", "v": "int4"}}),
)
"""Settings, most promising first; one that a policy cannot have, or has, is left out for it."""


@dataclass(frozen=True)
class Candidate:
    """A policy as a file would say it, with its budget.

    Attributes:
        name: of the policy it started from, and what was laid over it.
        data: `extends` and the fields that differ.
        policy: the same, checked, with its budget in it.
        kind: one of `KINDS`.
    """

    name: str
    data: dict[str, Any]
    policy: Policy
    kind: str

    @property
    def key(self) -> str:
        """Equal for equal policies."""
        return replace(self.policy, name="").fingerprint


def candidate(name: str, data: dict[str, Any], budget: int | float | str) -> Candidate:
    """A checked candidate. Of tokens held as codes more go into the bytes of a fraction: it becomes one of bytes. What
    evicts nothing has no budget.

    Raises:
        PolicyError: it cannot be, or not with this budget.
    """
    policy = Policy.load({"name": "tuned", **data})
    coded = "dense" not in (policy.store.k, policy.store.v) or policy.store.k != policy.store.v
    demoted = policy.evicted is not None and policy.evicted.to is not None
    if not policy.keeps_all:
        policy = policy.with_budget(_of_bytes(budget) if coded or demoted else budget)
    kind = "codes" if coded or demoted else "replay" if policy.replays else "one-pass"
    return Candidate(name, data, policy, kind)


def _of_bytes(budget: int | float | str) -> int | float | str:
    found = share(budget)
    amount = found[0] if found else budget
    return f"{100 * amount:g}% bytes" if isinstance(amount, float) else budget


def bases(default: str, budget: int | float | str, wanted: list[str], without: set[str]) -> list[Candidate]:
    """The default, which all others are compared with, and the policies to start from, in the order in which they are
    tried.

    Args:
        default: a built-in name.
        wanted: names and files; empty for all built-in ones that need no weights and no marks of the caller.
        without: of `KINDS`.

    Raises:
        PolicyError: the budget suits none, or a wanted one is not right.
    """
    first = candidate(default, {"extends": default}, budget)
    others = sorted(set(names()) - UNTRIED - {*FIRST, *SLOW})
    found = [first]
    for name in wanted or [*FIRST, *others, *SLOW]:
        try:
            made = candidate(_short(name), {"extends": _rooted(name)}, budget)
        except PolicyError:
            if wanted:
                raise
            continue
        usable = made.kind not in without and not made.policy.marks
        if (wanted or usable) and made.key not in {one.key for one in found}:
            found.append(made)
    return found


def _short(name: str) -> str:
    return Path(name).stem if name.endswith((".yaml", ".yml")) else name


def _rooted(name: str) -> str:
    return str(Path(name).resolve()) if name.endswith((".yaml", ".yml")) else name


def moves(base: Candidate, budget: int | float | str, without: set[str]) -> Iterator[Candidate]:
    """A candidate with one more setting, for each that it can have."""
    for name, change in MOVES:
        if not _matters(base.policy, change):
            continue
        try:
            made = candidate(f"{base.name} + {name}", _laid(base.data, change), budget)
        except PolicyError:
            continue
        if made.kind not in without and made.key != base.key:
            yield made


def _matters(policy: Policy, change: dict[str, Any]) -> bool:
    """A window needs a policy that has one, a safeguard heads that share."""
    if "observe" in change:
        return policy.observe.queries not in (0, "all")
    return {*change.get("allocate", {})} != {"safeguard"} or policy.allocate.heads == "flat"


def _laid(data: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    both = {**data}
    for key, value in change.items():
        known = both.get(key)
        both[key] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    return both
