"""Why a write into a buffer, of which an attention reads, is no cache update: the write's fault, or the read's."""

from __future__ import annotations

from typing import Any

from kvpass.patterns.cache_buffer import BufferUpdate
from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import argument, call_name, is_input, operand
from kvpass.graph.dataflow import Flow
from kvpass.graph.miss import Miss
from kvpass.graph.nearby import whole
from kvpass.graph.pools import gathered, writes_rows
from kvpass.graph.shapes import same, shape_of
from kvpass.graph.views import is_view

_NEW = {"setitem": 2, "index_copy": 3, "scatter": 3, "index_put": 2, "copy": 1, "slice_scatter": 1, "select_scatter": 1}
"""Where a write's new tokens stand in its arguments."""
_READ_HINT = "read the whole buffer under a mask, or its front up to the last new token: buf[:, :, :end]"
_WRITE_HINT = (
    "write all new tokens at once, with one index along the token axis: buf[:, :, pos] = k, buf[:, :, a:b] = k, "
    "buf.index_copy_(2, pos, k)"
)


def why_unwritten(base: fx.Node, write: fx.Node, flow: Flow) -> Miss:
    """What is to blame, if an attention reads `base`, which `write` writes into."""
    gather, name = gathered(base), call_name(write)
    if gather is not None or writes_rows(write):
        what = f"{name} and {call_name(gather or base)} move rows of a pool, in places that a table says"
        return Miss(Reason.PAGED_CACHE, gather or write, what)
    if _is_update(write, flow):
        read = next((node for node in whole(base) if not is_view(node)), base)
        what = f"{call_name(read)} takes a part of the buffer that {name} writes into, which is not known as its front"
        return Miss(Reason.UNSUPPORTED_ATTENTION, read, what, hint=_READ_HINT)
    start = f"the cache is written by {name}"
    new = _new(write)
    if new is None:
        return Miss(Reason.UNSUPPORTED_UPDATE, write, f"{start}, which says no place", hint=_WRITE_HINT)
    *_, home = whole(operand(write))
    if not is_input(home) and not {home, write} & flow.outputs.keys():
        hint = "return the buffer, or let the caller or the module hold it"
        return Miss(Reason.UNSUPPORTED_UPDATE, write, f"{start} into {home.name}, which this call forgets", hint=hint)
    sizes, into = shape_of(new), shape_of(home)
    if len(sizes) != len(into) or sum(not same(a, b) for a, b in zip(sizes, into, strict=True)) > 1:
        what = f"{start}: {tuple(sizes)} into a part of {tuple(into)}"
        hint = "keep a buffer for each of keys and values, [B, Hkv, T, D] or [B, T, Hkv, D], and " + _WRITE_HINT
        return Miss(Reason.UNSUPPORTED_UPDATE, write, what, hint=hint)
    return Miss(Reason.UNSUPPORTED_UPDATE, write, f"{start}, in places that are not known", hint=_WRITE_HINT)


def _is_update(write: fx.Node, flow: Flow) -> bool:
    try:
        return BufferUpdate().match(write, flow) is not None
    except Miss:
        return False


def _new(write: fx.Node) -> fx.Node | None:
    at = _NEW.get(call_name(write).removesuffix("_"))
    new: Any = argument(write, at, "source", argument(write, at, "src")) if at is not None else None
    return new if isinstance(new, fx.Node) and isinstance(operand(write), fx.Node) else None
