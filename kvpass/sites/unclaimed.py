"""Cache updates that no site took: attention in a form that nobody knows, or none at all."""

from __future__ import annotations

from typing import Any

from torch import fx

from kvpass.errors import Reason
from kvpass.graph.attended import attended_by
from kvpass.graph.autocast import autocast_of
from kvpass.graph.calls import argument, call_name, source_line
from kvpass.graph.dataflow import Flow
from kvpass.graph.indexer import choice_below
from kvpass.graph.miss import Miss
from kvpass.graph.module_names import module_path
from kvpass.graph.nearby import whole
from kvpass.graph.shapes import normal_dim, same, shape_of
from kvpass.sites.kept import ESCAPES, change_between
from kvpass.sites.near import near_misses
from kvpass.sites.site import Site
from kvpass.sites.table import Decline
from kvpass.terms import CacheForm


def unclaimed(found: Any, sites: list[Site], declined: list[Decline]) -> list[Decline]:
    """Cache updates that no site took and no core was blamed for: attention in a form nobody knows, or none at
    all.
    """
    halves = [half.update for site in sites for half in (site.key, site.value)]
    taken = {node for update in halves for node in (update.node, update.write)} | found.blamed
    taken |= {node for core in found.cores for arg in (*core.cached, core.k, core.v) for node in whole(arg)}
    claimed = {id(found.updates[node]) for node in taken if node in found.updates}
    named = {decline.site for decline in declined}
    extra: dict[str, Decline] = {}
    for node in sorted({*found.updates, *found.missed_updates}, key=found.flow.order.__getitem__):
        if node in taken or module_path(node) in named or len(shape_of(node)) < 3:
            continue
        if id(found.updates.get(node)) in claimed:
            continue  # another name of a buffer whose attention was refused
        miss = _refused(found, node) if node in found.missed_updates else _unattended(found, node)
        known = extra.get(module_path(node))
        if miss is not None and (known is None or known.reason is Reason.NO_ATTENTION):
            near = () if miss.pattern else near_misses(found.patterns.cores, node)
            extra[module_path(node)] = decline(node, miss, near)
    return list(extra.values())


def _refused(found: Any, node: fx.Node) -> Miss | None:
    """Why a `cat` is no update, if some attention has its length; else it is no cache either."""
    miss = found.missed_updates[node]
    axis = found.updates[node].axis if node in found.updates else miss.axis
    if axis is None:
        axis = normal_dim(argument(node, 1, "dim", 0), len(shape_of(node)))
    blocker = attended_by(found.flow, node, axis, [*node.all_input_nodes, *miss.reads])
    return miss if blocker is not None else None


def _unattended(found: Any, node: fx.Node) -> Miss | None:
    """Why nothing known attends over a returned `cat`; None if it is no cache: nothing in the graph attends over
    its length, and no second one grows along with it.
    """
    if node not in found.updates:
        return None
    update = found.updates[node]
    assert update.axis is not None
    choice = choice_below(found.flow, node)
    if choice is not None:
        return Miss(Reason.INDEXER, choice, f"{node.name} only chooses what is seen, by {call_name(choice)}")
    blocker = attended_by(found.flow, node, update.axis, [update.new])
    if blocker is not None and any(found.flow.between(core, blocker) for core in found.refused_cores):
        return None  # the values of an attention that was refused already
    if blocker is not None:
        what = f"{node.name} feeds {call_name(blocker)}, which is no known attention over it"
        change = changes_of(found.flow, node, found.operands(blocker))
        return change or Miss(Reason.UNSUPPORTED_ATTENTION, blocker, what)
    if update.form is CacheForm.BUFFER:
        return None  # a tensor that is written in part may be anything
    length = shape_of(node)[update.axis]
    twins = [u for u in found.updates.values() if u.form is update.form and same(shape_of(u.node)[u.axis or 0], length)]
    if len(twins) < 2:
        return None
    readers = found.flow.escapes([node], ())
    if readers:
        return Miss(Reason.UNSUPPORTED_ATTENTION, readers[0], f"{node.name} feeds {call_name(readers[0])}")
    return Miss(Reason.NO_ATTENTION, node, "nothing in this graph attends over it")


def changes_of(flow: Flow, cache: fx.Node, bases: list[fx.Node]) -> Miss | None:
    """What stands between a cache and the keys and values that an attention reads."""
    found = (change_between(flow, cache, base, reason) for reason, base in zip(ESCAPES, bases, strict=False))
    return next(filter(None, found), None)


def decline(node: fx.Node, miss: Miss, near: tuple[str, ...] = ()) -> Decline:
    """A refused core or cache for people. What autocast turns into another dtype fits no pattern: that is the cause."""
    cast = None if miss.reason.by_choice else autocast_of(node)
    if cast is not None:
        miss = Miss(Reason.AUTOCAST, node, cast)
    name, source = module_path(node) or node.name, source_line(miss.node) or source_line(node)
    return Decline(name, miss.reason, miss.node.name, source, miss.detail, miss.pattern, near, miss.hint)
