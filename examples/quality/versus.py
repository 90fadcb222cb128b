"""kvpass beside kvpress in the same bytes: the rows that both have, and their differences trial by trial."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quality import stats
from quality.measure import FIRST_CALL
from quality.prompts import MODES, TASKS

PEER = "kvpress "
COLUMNS = ["policy", "KL", "kvpress' KL", "KL, difference", "aware NLL", "difference", "agnostic NLL", "difference"]

ABOUT = """Both compress the first call of a cache and keep every later token, so both hold the same number of slots
at every step (`held %` differs by what rounds, and by kvpass' spare slots). A difference is kvpass less kvpress,
mean and half of the 95 % t interval over pairs (texts, or questions): below zero kvpass is nearer to the full
cache, or surer of the right digits; an interval that holds zero tells nothing apart. What is defined otherwise in
the two is listed in `tests/kvpress/test_vectors.py`."""


def pairs(cells: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(policy, kvpass' cell, kvpress' cell) of the same budget."""
    found = {c["policy"]: c for c in cells}
    for name, ours in sorted(found.items()):
        policy = name.removesuffix(FIRST_CALL)
        if policy != name and PEER + policy in found:
            yield policy, ours, found[PEER + policy]


def row(policy: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    kl = [cell["text"]["kl"] for cell in (ours, theirs)]
    out = [f"`{policy}`", *(f"{stats.mean(values)[0]:.3f}" for values in kl), _difference(*kl, digits=3)]
    for mode in MODES:
        nll = [[entry["nll"] for task in TASKS for entry in cell["retrieval"][mode][task]] for cell in (ours, theirs)]
        out += [f"{stats.mean(nll[0])[0]:.2f}", _difference(*nll, digits=2)]
    return out


def _difference(ours: list[float], theirs: list[float], digits: int) -> str:
    middle, low, _ = stats.mean([a - b for a, b in zip(ours, theirs, strict=True)])
    return f"{middle:+.{digits}f} ± {middle - low:.{digits}f}"
