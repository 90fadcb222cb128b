"""Numbers and a scorer's options that would only fail inside an op, said before any compilation."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any

from kvpass.errors import PolicyError
from kvpass.kernels.rank.scorers.registry import Scorer
from kvpass.policy.spec import Spec

MOST = 2**31 - 1
"""Ops count in 32 bits."""

_ODD = (lambda size: size >= 1 and size % 2 == 1, "give an odd number")
_SHARE = (lambda share: 0 <= share <= 1, "give a number from 0 to 1")
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "pool": _ODD,
    "balance": _SHARE,
    "nucleus": _SHARE,
    "threshold": (lambda cosine: -1 <= cosine <= 1, "give a cosine, from -1 to 1"),
    "most": _SHARE,
    "least": _SHARE,
    "hitters": _SHARE,
    "blend": (lambda factor: factor >= 0, "give a number >= 0"),
    "sketch": (lambda size: size >= 1, "give a number of columns, 1 or more"),
    "chunk": (lambda tokens: tokens >= 1, "give a number of tokens, 1 or more"),
    "gamma": (lambda factor: factor >= 0, "give a number >= 0"),
    "sinks": (lambda tokens: tokens >= 0, "give a number >= 0"),
    "recent": (lambda tokens: tokens >= 0, "give a number >= 0"),
    "skip": (lambda tokens: tokens >= 0, "give a number >= 0"),
    "future": (lambda tokens: tokens >= 1, "give a number of tokens, 1 or more"),
    "near": (lambda tokens: tokens >= 0, "give a number of tokens, 0 or more"),
    "sharp": (lambda power: power >= 0, "give a power, 0 or more"),
    "heard": (lambda share: share >= 0, "give a number >= 0"),
    "block": (lambda tokens: tokens >= 2, "give a number of tokens, 2 or more"),
}
"""Options of kvpass' own scorers, by name: what is allowed, and the fix."""


def plain_number(value: Any) -> Any:
    """A number of Python's for one of numpy's; anything else as it is. Policies compare by their text."""
    if isinstance(value, (bool, int)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def no_number(budget: Any) -> str:
    """What to give in place of a budget that is no number."""
    hint = "give budget=0.2 or budget=1024 (a fraction of the tokens, or slots)"
    if isinstance(budget, str):
        return f"{hint}, without quotes"
    return f"{hint}; budget.item() is the number in a tensor" if hasattr(budget, "item") else hint


def check_options(p: Spec, chosen: Scorer, where: str) -> None:
    """Names, types and ranges of a scorer's options.

    Raises:
        PolicyError: naming the option and the fix.
    """
    for name, value in p.options.items():
        key = f"options.{name}"
        if name not in chosen.options:
            near = difflib.get_close_matches(name, chosen.options, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            listed = ", ".join(f"{k} ({v!r})" for k, v in chosen.options.items()) or "none"
            raise PolicyError(f"unknown key {key!r}", where=where, hint=f"{hint}options of {chosen.name!r}: {listed}")
        default = chosen.options[name]
        number = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
        fix = "" if number or type(value) is type(default) else f"give a {type(default).__name__}"
        fix = fix or _out_of_range(name, value, chosen)
        if fix:
            raise PolicyError(f"bad value {value!r} in {key!r}", where=where, hint=fix)


def _out_of_range(name: str, value: Any, chosen: Scorer) -> str:
    """The fix, for a number that no scorer can use."""
    if isinstance(value, float) and not math.isfinite(value):
        return "give a finite number"
    if name in _RANGES and chosen.run.__module__.startswith("kvpass."):
        allowed, fix = _RANGES[name]
        return "" if allowed(value) else fix
    return ""


def oversized(data: Any, path: str = "") -> Iterator[str]:
    """Dotted names of the integers in plain data that no op can hold."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from oversized(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, int) and abs(data) > MOST:
        yield path
