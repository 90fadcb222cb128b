"""What must hold for a core and its two updates to be a site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from kvpass.errors import Reason
from kvpass.graph.autocast import autocast_of
from kvpass.graph.calls import example, is_input, is_metadata, operand, source_line
from kvpass.graph.dataflow import Flow
from kvpass.graph.miss import Miss
from kvpass.graph.nearby import home_of, taken_out
from kvpass.graph.shapes import is_one, quotient, same, shape_of
from kvpass.graph.visibility import Visibility
from kvpass.sites.queries import check_queries
from kvpass.sites.rows import check_rows
from kvpass.sites.site import Core, End, Half, Mixed, Site, Update
from kvpass.terms import CacheForm, Phase

Parts = Sequence[tuple[fx.Node, int | None]]
"""Views that take the written part of a buffer, each with its axis of tokens."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def make_site(name: str, core: Core, key: Half, value: Half, layer: int, mixed: Mixed | None = None) -> Site:
    k, v = shape_of(key.update.new), shape_of(value.update.new)
    batch = k[key.layout.batch_axis]
    dims = {**_query_dims(core, batch), "Hkv": key.layout.heads(k), "Dv": value.layout.entries(v)}
    with_past = Phase.DECODE if is_one(dims["S"]) else Phase.EXTEND
    if core.latent is not None:
        dims |= {"D": core.latent.rank + v[3], "Dv": 0}  # latent and rotated key in one slot; values are a part of it
    if mixed is not None:
        dims |= {"Hkv": 1} | {d: mixed.heads * width for d, width in zip(("D", "Dv"), mixed.widths, strict=True)}
    fresh = key.update.past is None or any(reads_only_new(half) for half in (key, value))
    phase = Phase.PREFILL if fresh else with_past
    dims = {letter: dims[letter] for letter in ("B", "Hq", "Hkv", "S", "D", "Dv")}
    dtype = example(key.update.new).dtype
    corner = core.causal and phase is not Phase.PREFILL
    unproved = Visibility(core.causal, corner, read=tuple(range(len(core.terms))))
    return Site(name, layer, phase, core, key, value, dims, dtype, source_line(core.node), mixed, unproved)


def check_site(site: Site) -> None:
    """Raises:
    Miss: core and updates do not belong together, or ask for something that the ops do not do.
    """
    core = site.core
    cast = autocast_of(core.node)
    if cast is not None:
        raise Miss(Reason.AUTOCAST, core.node, cast)
    if site.mixed is None:
        _check_heads(site)
    dtypes = {example(half.update.new).dtype for half in (site.key, site.value)}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        raise Miss(Reason.DTYPE, core.node, f"keys and values are {sorted(map(str, dtypes))}")
    keys, values = (shape_of(half.update.new)[half.layout.token_axis] for half in (site.key, site.value))
    if not same(keys, values):
        raise Miss(Reason.KEY_VALUE_MISMATCH, core.node, f"{keys} new keys, {values} new values")
    check_queries(site)
    for term in core.terms:
        if not 1 <= len(shape_of(term.node)) <= len(term.axes):
            raise Miss(Reason.MASK_SHAPE, term.node, f"mask of shape {shape_of(term.node)}")
    check_rows(site)
    if core.causal and site.phase is Phase.DECODE:
        raise Miss(Reason.CAUSAL_WITH_PAST, core.node, "is_causal=True with one query")


def buffer_readers(flow: Flow, update: Update, chain: tuple[fx.Node, ...], core: list[fx.Node]) -> list[fx.Node]:
    """Whoever else reads a buffer as data: neither the write, nor the views down to the core, nor the core."""
    write = update.write
    assert write is not None
    region = {update.node, write, *update.inner, *chain, *(taken_out(update.past, update.path) if update.past else ())}
    part = operand(write)
    if isinstance(part, fx.Node) and part is not update.node and not is_input(part):
        region.add(part)  # the slice that copy_ writes into
    found = flow.escapes(region, core)
    if update.past is not None and update.past is not update.node:
        parts = [user for user in update.past.users if user not in region and not is_metadata(user)]
        found += [user for user in parts if not update.path or home_of(user)[1] in ((), update.path)]
    return found


def check_buffer(
    flow: Flow, core: Core, update: Update, chain: tuple[fx.Node, ...], parts: Parts, lengths: Sequence[Any]
) -> End | None:
    """An attention over a buffer sees what was written, and nothing beyond. Returns how much it reads, if a call must
    tell whether that is so.

    parts: views that take its written part; `lengths`: of the keys' buffer and the values', which an attention over all
    of both takes to be the same.

    Raises:
        Miss: UNSUPPORTED_UPDATE if it reads before the write, MASK_UNKNOWN if nothing hides the rest of the buffer.
    """
    assert update.write is not None
    assert update.axis is not None
    early = [node for node in (*chain, core.node) if flow.order[node] < flow.order[update.write]]
    if early:
        raise Miss(Reason.UNSUPPORTED_UPDATE, early[0], f"{early[0].name} reads the buffer before it is written")
    rows = shape_of(update.node)[0], shape_of(update.new)[0]
    if is_input(update.node) and not same(*rows) and not parts:
        what = f"{rows[1]} of the {rows[0]} sequences of the buffer are written, and all of them are read"
        raise Miss(Reason.UNSUPPORTED_UPDATE, update.write, what)
    front = next(((node, axis) for node, axis in parts if axis is not None), None)
    if front is not None:
        return _end_of(core, update, *front)
    if update.start == 0 and same(shape_of(update.new)[update.axis], shape_of(update.node)[update.axis]):
        return None  # all of it is written
    covering = [term for term in core.terms if any(same(shape_of(term.node)[-1], core.behind + n) for n in lengths)]
    if not covering and not (core.causal and (update.past is None or update.start == 0)):
        raise Miss(Reason.MASK_UNKNOWN, core.node, "the attention reads the whole buffer, and no mask spans it")
    return None


def _end_of(core: Core, update: Update, front: fx.Node, axis: int) -> End | None:
    """A part of the buffer is read: it must end where the new tokens end, or be masked behind them."""
    assert update.axis is not None
    start = example(update.start) if isinstance(update.start, fx.Node) else update.start
    new, end = shape_of(update.new)[update.axis], shape_of(front)[axis]
    if same(end, new):
        return None  # right where the tokens are the first ones: `reads_only_new`
    if not isinstance(start, torch.Tensor) and same(end, start + new):
        return None
    masked = any(same(shape_of(term.node)[-1], core.behind + end) for term in core.terms)
    if not masked and all(isinstance(size, int) for size in (end, start, new)):
        raise Miss(Reason.UNSUPPORTED_ATTENTION, front, "the part of the buffer that is read does not end with the new")
    return End(end, masked)


def reads_only_new(half: Half) -> bool:
    """Does the attention read as much of a buffer as is new? Then the graph is a prefill; the runtime checks that the
    tokens are written at 0.
    """
    update = half.update
    if update.form is not CacheForm.BUFFER or update.start == 0:
        return update.start == 0 and update.past is not None
    new = shape_of(update.new)[half.layout.token_axis]
    return any(axis is not None and same(shape_of(node)[axis], new) for node, axis in half.parts)


def _check_heads(site: Site) -> None:
    """Every KV head belongs to the same number of query heads, every sequence of keys to one sequence of queries."""
    batch, heads, kv_heads = (site.dims[letter] for letter in ("B", "Hq", "Hkv"))
    node = site.core.node
    for half in (site.key, site.value):
        sizes = shape_of(half.update.new)
        shared, rows = half.layout.heads(sizes), sizes[half.layout.batch_axis]
        if not same(rows, batch):
            raise Miss(Reason.LAYOUT, node, f"{batch} sequences of queries, {rows} of keys or values")
        if not same(shared, kv_heads):
            raise Miss(Reason.KEY_VALUE_MISMATCH, node, f"{kv_heads} heads of keys, {shared} of values")
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads % kv_heads:
        raise Miss(Reason.LAYOUT, node, f"{heads} query heads do not share {kv_heads} KV heads evenly")


def _query_dims(core: Core, batch: Any) -> dict[str, Any]:
    """B, Hq, S, D of a core's queries; `batch` is that of its keys."""
    sizes = dict(zip(core.axes.q, shape_of(core.q), strict=True))
    if "N" in sizes:
        return {"B": batch, "Hq": quotient(sizes["N"], batch), "S": sizes["S"], "D": sizes["D"]}
    heads = sizes["H"] * sizes["G"] if "G" in sizes else sizes["H"]
    return {"B": sizes["B"], "Hq": heads, "S": sizes["S"], "D": sizes["D"]}
