"""Short ways to write what a policy file says: `store: int4`, `evicted: merge`, `to: int2`, `budget: 20% bytes`; and
policies that are only a store.
"""

from __future__ import annotations

import re
from typing import Any

_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*(?:of\s+)?(tokens|bytes)?\s*")


def written_out(data: dict[str, Any]) -> dict[str, Any]:
    """A policy's data with its short ways written out; anything else is left to those who check it."""
    data = dict(data)
    if isinstance(data.get("store"), str):
        data["store"] = dict.fromkeys(("k", "v"), data["store"])
    if data.get("evicted") in ("drop", "merge", "refit"):
        data["evicted"] = {} if data["evicted"] == "drop" else {data["evicted"]: {}}
    if isinstance(data.get("evicted"), dict) and isinstance(data["evicted"].get("to"), str):
        data["evicted"] = {**data["evicted"], "to": dict.fromkeys(("k", "v"), data["evicted"]["to"])}
    said = share(data.get("budget"))
    if said is not None:
        data["budget"], unit = said
        data["unit"] = unit or data.get("unit", "tokens")
    return data


def alone(data: dict[str, Any]) -> dict[str, Any]:
    """A policy that only says what slots hold: nothing is evicted, and it is called by that."""
    store = data.get("store")
    if store is None or not set(data) <= {"store", "layers", "name", "notes"}:
        return data
    halves = store if isinstance(store, dict) else {"k": store, "v": store}
    k, v = (halves.get(half, "dense") for half in ("k", "v"))
    return {"name": f"{k}" if k == v else f"k {k}, v {v}", "budget": 1.0, **data}


def share(budget: Any) -> tuple[float, str] | None:
    """The fraction and the unit, "" if none is said, of a budget in words: `20% bytes`, `12.5%`; None if it is none."""
    found = _SHARE.fullmatch(budget) if isinstance(budget, str) else None
    return (float(found[1]) / 100, found[2] or "") if found else None
