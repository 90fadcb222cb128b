"""Why keys and values of one attention do not belong together: what is kept of each, in words."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import call_name, is_input
from kvpass.graph.dataflow import Flow
from kvpass.graph.miss import Miss
from kvpass.graph.nearby import nearby
from kvpass.graph.shapes import shape_of
from kvpass.sites.kept import half_otherwise
from kvpass.sites.site import Core, Update
from kvpass.terms import CacheForm

WORDS = {
    CacheForm.CONCAT: "appended to a past",
    CacheForm.EMPTY: "appended to an empty past",
    CacheForm.RETURNED: "this call's alone, and returned",
    CacheForm.BUFFER: "written into a buffer",
}
NAMES = "keys", "values"


def mismatch(flow: Flow, core: Core, bases: Sequence[fx.Node], updates: tuple[Update | None, Update | None]) -> Miss:
    """Of two updates that differ in form, or of which one is missing."""
    for at, update in enumerate(updates):
        other = updates[1 - at]
        if update is None:
            kept = half_otherwise(flow, core, bases, at)
            if kept is not None:
                return kept
        elif update.form is CacheForm.RETURNED and other is not None and other.past is not None:
            past = _past(update.node)
            if past is not None:
                what = f"{update.node.name} is made of {past.name} by {call_name(update.node)}"
                hint = f"cache the {NAMES[at]} as the {NAMES[1 - at]} are: {WORDS[other.form]}"
                return Miss(Reason.UNSUPPORTED_UPDATE, update.node, what, (past,), hint)
    words = [WORDS[u.form] if u is not None else "not cached" for u in updates]
    at = next((at for at, u in enumerate(updates) if u is None or u.form is CacheForm.RETURNED), 0)
    return Miss(Reason.KEY_VALUE_MISMATCH, bases[at], f"keys are {words[0]}, values are {words[1]}")


def _past(node: fx.Node) -> fx.Node | None:
    """An input with three or more dimensions that a value is computed from, without a projection."""
    found = nearby(node, lambda n: n.all_input_nodes)
    return next((n for n in found if is_input(n) and len(shape_of(n)) >= 3), None)
