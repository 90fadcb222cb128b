"""All terms of a site's mask as the one mask that the ops take."""

from __future__ import annotations

import operator

import torch
from torch import fx

from kvpass.graph.shapes import shape_of
from kvpass.lowering.emit_heads import regrouped
from kvpass.lowering.emit_nodes import Writer
from kvpass.sites.site import Term
from kvpass.terms import CacheForm, MaskKind


def mask_of(write: Writer, position: fx.Node | int) -> fx.Node | None:
    """One 4-d mask that broadcasts to [B, Hq, S, T]: bool, or float if something is added; None if nothing masks.

    Args:
        position: where this call's tokens begin. Over a buffer, the mask is that of what is written.
    """
    site, masks = write.site, write.low.masks
    if site.key.update.form is not CacheForm.BUFFER or not site.core.terms:
        return _joined(write)
    made_of = (site.core.terms, str(site.dims["S"]), site.core.tiled)
    if made_of not in masks:
        new = write.method("size", write.copy(site.key.update.new), site.key.layout.token_axis)
        end = write.call(operator.add, position, new)
        masks[made_of] = write.op("written", _joined(write), end)
    return masks[made_of]


def _joined(write: Writer) -> fx.Node | None:
    kept: fx.Node | None = None
    added: fx.Node | None = None
    for term in write.site.core.terms:
        node = _four_axes(write, term)
        if term.kind is MaskKind.ADD:
            node = node if term.factor == 1.0 else write.call(operator.mul, node, term.factor)
            added = node if added is None else write.call(operator.add, added, node)
        else:
            node = write.call(operator.invert, node) if term.kind is MaskKind.HIDE else node
            kept = node if kept is None else write.call(operator.and_, kept, node)
    if added is None or kept is None:
        return added if kept is None else kept
    return write.call(torch.where, kept, added, float("-inf"))


def _four_axes(write: Writer, term: Term) -> fx.Node:
    """A term as [B, Hq, S, T], each axis of its full size or 1."""
    node, shape = write.copy(term.node), shape_of(term.node)
    missing = len(term.axes) - len(shape)
    if missing:
        node = write.call(operator.getitem, node, (None,) * missing + (Ellipsis,))
    sizes = dict(zip(term.axes, (1,) * missing + tuple(shape), strict=True))
    site = write.site
    if "N" in term.axes:
        heads = (1, 1) if sizes["N"] == 1 else (-1, site.dims["Hq"])
        node = write.method("unflatten", node, 0, heads)
    elif "G" in term.axes:
        if sizes["H"] != 1 or sizes["G"] != 1:
            node = write.method("expand", node, -1, site.dims["Hkv"], site.group, -1, -1)
        node = write.method("flatten", node, 1, 2)
    shared = (sizes["N"] if "N" in term.axes else sizes["H"]) == 1
    return node if shared else regrouped(write, node, 1, to_model=False)
