"""One cached tensor of a site, as its attention reads it, and what must hold for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from kvpass.errors import Reason
from kvpass.graph.aliases import changed
from kvpass.graph.calls import is_metadata
from kvpass.graph.dataflow import Flow
from kvpass.graph.layouts import Written, is_tiled, read_layout
from kvpass.graph.miss import Miss
from kvpass.graph.shapes import shape_of
from kvpass.sites.rules import buffer_readers, check_buffer
from kvpass.sites.site import Core, Half, Update
from kvpass.terms import CacheForm


def half_of(
    flow: Flow,
    core: Core,
    at: int,
    update: Update,
    chain: tuple[fx.Node, ...],
    readers: int,
    beside: set[fx.Node],
    lengths: Sequence[Any],
) -> Half:
    """A cached tensor as the core reads it.

    Args:
        at: 0 for keys, 1 for values.
        chain: views from the tensor down to the core.
        readers: attentions that read it.
        beside: what else may read it: views down to the other half, if it lies in the same tensor.
        lengths: of the buffers of keys and values.

    Raises:
        Miss: a rule of sites is broken.
    """
    reason, roles, end = (Reason.KEY_ESCAPES, Reason.VALUE_ESCAPES)[at], (core.axes.k, core.axes.v)[at], None
    written = _written(update)
    layout = read_layout(update.node, chain, update.axis, roles, core.tiled, written)
    parts = tuple(written.parts.items()) if written is not None else ()
    if update.axis is not None and update.axis != layout.token_axis:
        raise Miss(Reason.CAT_AXIS, update.node, f"cat along axis {update.axis} of {layout.value}")
    if readers > 1:
        raise Miss(Reason.SHARED_CACHE, update.node, f"{readers} attentions read it")
    cores = [core.node, *core.inner]
    if update.form is CacheForm.BUFFER:
        escaped = buffer_readers(flow, update, (*chain, *beside), cores)
        end = check_buffer(flow, core, update, chain, parts, lengths)
    else:
        region = {*chain, *beside} | (set() if update.form is CacheForm.RETURNED else {update.node, *update.inner})
        escaped = flow.escapes(region, cores)
        if update.past is not None:
            escaped += flow.escapes([update.past], [update.node, *update.inner])
    if escaped:
        raise Miss(reason, escaped[0], f"{update.node.name} also feeds {escaped[0].name}")
    check_unchanged(flow, core, update)
    growing = update.form is not CacheForm.BUFFER
    for view in chain:
        if growing and view in core.joins(at):
            continue  # the length behind a memory is the cache's and a number
        sizes = [user for user in view.users if is_metadata(user) and user.users]
        if sizes and view not in flow.outputs:
            raise Miss(reason, sizes[0], f"the size of {view.name}, a view of the cache, is read")
    places = {at for node in (update.node, update.write) if node for at in flow.outputs.get(node, [])}
    return Half(update, layout, chain, tuple(sorted(places)), end, parts)


def check_unchanged(flow: Flow, core: Core, update: Update) -> None:
    """The op reads everything where the attention stands; it must still be what was read or cached before."""
    order, end = flow.order, flow.order[core.node]
    written = update.write if update.write is not None else update.node
    taken = order[written] if update.form is not CacheForm.RETURNED else end
    change = changed(update.new, taken, len(order), order)
    if change is not None:
        raise Miss(Reason.UNSUPPORTED_UPDATE, change, f"{update.new.name} is changed after it was cached")
    joins = () if core.memory is None else (core.memory.k, core.memory.v)
    begins = min((order[node] for node in (*core.inner, *(joined.node for joined in joins))), default=end)
    read = [core.q, *(joined.memory for joined in joins), *(term.node for term in core.terms)]
    for node in read + ([core.sinks] if core.sinks is not None else []):
        change = changed(node, begins, end, order)
        if change is not None:
            raise Miss(Reason.UNSUPPORTED_ATTENTION, change, f"{node.name} is changed inside the attention")


def is_tiled_core(core: Core, updates: tuple[Update, Update], chains: Sequence[tuple[fx.Node, ...]]) -> bool:
    """Are the KV heads of keys and values both tiled?"""
    if "G" in core.axes.q or "G" in core.axes.out:
        return False
    roles = core.axes.k, core.axes.v
    both = zip(updates, chains, roles, strict=True)
    return all(is_tiled(u.node, chain, u.axis, r, _written(u)) for u, chain, r in both)


def _written(update: Update) -> Written | None:
    return Written(update.axis, shape_of(update.new)) if update.form is CacheForm.BUFFER else None
