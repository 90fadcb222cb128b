"""kvpass beside kvpress in the same bytes: the rows that both have, and their differences trial by trial."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quality import stats
from quality.prompts import MODES

PEER = "kvpress "
"""Before a policy's name: kvpress' own."""

FIRST_CALL, LIKE_PEER = " (first call)", " (as kvpress)"
"""Behind a policy's name: it evicts in the first call of a cache and never again; and has kvpress' settings, too."""

SNAPKV = {"observe": {"queries": 64}, "pool": {"kind": "avg", "size": 5}, "protect": {"recent": 64}}
SETTINGS: dict[str, dict[str, Any]] = {
    "snapkv": SNAPKV,
    "pyramidkv": SNAPKV,
    "criticalkv": SNAPKV,
    "chunkkv": SNAPKV,
    "knorm": {"protect": {"recent": 0}},
}
"""Where kvpress' numbers are others than the presets'."""

UNEVEN: dict[str, dict[str, Any]] = {
    "ada_snapkv": SNAPKV,
    "critical_ada": SNAPKV,
    "kvzip": {},
    "kvzip_plus": {},
    "ada_expected": {
        "extends": "expected_attention",
        "weight": {"by": "l2", "floor": 0.01},
        "allocate": {"heads": "flat", "safeguard": 0.2},
        "shortest": 64,  # judged once, as kvpress does; the budget holds for the answers too, which it does not there
        "when": "always",
    },
}
"""The same, where heads get different numbers of slots: later calls of several tokens lay these out anew."""

BOTH = ("snapkv", "tova", "knorm", "keydiff", "expected_attention", "streaming_llm", "lagkv", "chunkkv", "criticalkv")
BOTH += ("pyramidkv", "random")
"""Policies that both have, and that give all heads the same number of slots: kvpress only masks where heads differ."""
COLUMNS = ["policy", "KL", "kvpress' KL", "KL, difference", "aware NLL", "difference", "agnostic NLL", "difference"]

ABOUT = """Both compress the first call of a cache and keep every later token, so both hold the same number of slots
at every step (`held %` differs by what rounds, and by kvpass' spare slots). A difference is kvpass less kvpress,
mean and half of the 95 % t interval over pairs (texts, or questions): below zero kvpass is nearer to the full
cache, or surer of the right digits; an interval that holds zero tells nothing apart. `first call`: kvpass' own
numbers (SnapKV's repository: a window of 32, max-pooling over 7). `as kvpress`: kvpress' (a window of 64, mean over
5; knorm protects nothing). What is defined otherwise in the two is listed in `tests/kvpress/test_vectors.py`."""


HELD_AS = " + "
"""Between a policy's name and what its slots hold; the budget is one of bytes then."""


def preset(name: str) -> str:
    """The built-in policy that a cell of kvpass' is made from."""
    return evicts_by(name).removesuffix(FIRST_CALL).removesuffix(LIKE_PEER)


def evicts_by(name: str) -> str:
    """The policy of `h2o + int4`."""
    return name.split(HELD_AS)[0]


def held_as(name: str) -> str:
    """What its slots hold: a codec, or those of keys and of values, `int8:int4`."""
    return name.split(HELD_AS)[1] if HELD_AS in name else "dense"


def beside_peer() -> list[str]:
    """What `run.py --beside-kvpress` measures."""
    return [policy + FIRST_CALL for policy in BOTH] + [policy + LIKE_PEER for policy in SETTINGS]


def spec_of(name: str) -> str | dict[str, Any]:
    """The policy that a cell's name means."""
    policy = preset(name)
    if policy == name:
        return name
    if HELD_AS in name:
        keys, _, values = held_as(name).partition(":")
        unit = "tokens" if policy == "full" else "bytes"
        return {"name": name, "extends": policy, "store": {"k": keys, "v": values or keys}, "unit": unit}
    settings = {**SETTINGS, **UNEVEN}[policy] if name.endswith(LIKE_PEER) else {}
    when = "calls" if policy in UNEVEN else "first"
    return {"name": name, "extends": policy, "when": when, **settings}


def is_own(name: str) -> bool:
    """Whether a cell is a policy as users get it: no comparison's, and not the full cache."""
    return name != "full" and not name.startswith(PEER) and name == preset(name)


def pairs(cells: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, kvpass' cell, kvpress' cell) of the same budget."""
    found = {c["policy"]: c for c in cells}
    for name, ours in sorted(found.items()):
        policy = preset(name)
        if policy != name and PEER + policy in found:
            yield name, ours, found[PEER + policy]


def row(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    kl = [cell["text"]["kl"] for cell in (ours, theirs)]
    out = [f"`{name}`", *(f"{stats.mean(values)[0]:.3f}" for values in kl), _difference(*kl, digits=3)]
    for mode in MODES:
        tasks = [task for task in ours["retrieval"][mode] if task in theirs["retrieval"][mode]]
        nll = [[entry["nll"] for task in tasks for entry in cell["retrieval"][mode][task]] for cell in (ours, theirs)]
        out += [f"{stats.mean(nll[0])[0]:.2f}", _difference(*nll, digits=2)]
    return out


def _difference(ours: list[float], theirs: list[float], digits: int) -> str:
    middle, low, _ = stats.mean([a - b for a, b in zip(ours, theirs, strict=True)])
    return f"{middle:+.{digits}f} ± {middle - low:.{digits}f}"
