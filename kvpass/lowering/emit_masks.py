"""What a site's ops take of its mask: words and tokens for what was proved, one tensor for the rest."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import fx

from kvpass.graph.calls import example
from kvpass.graph.shapes import is_one, shape_of
from kvpass.lowering.emit_heads import regrouped
from kvpass.lowering.emit_nodes import Writer
from kvpass.sites.rows import is_regrouped, rows_of_sequence
from kvpass.sites.site import Term
from kvpass.terms import CacheForm, MaskKind, Phase


class Seen(NamedTuple):
    """What is seen of the keys: words of `Sees`, which columns hold a token, bool [1 or B, T], with their bounds, and a
    4-d mask that broadcasts to [B, Hq, S, T], bool, or float if something is added.
    """

    words: str
    tokens: fx.Node | None
    bounds: fx.Node | None
    mask: fx.Node | None


def seen_of(write: Writer, position: fx.Node | int) -> Seen:
    """What the ops of a site take.

    Args:
        position: where this call's tokens begin. Over a buffer, the mask is that of what is written.
    """
    seen = write.site.seen
    mask = _mask_of(write, position) if seen.read else None
    if seen.tokens is None:
        spans = mask is not None and seen.words in ("", "mean") and write.site.phase is Phase.PREFILL
        return Seen(seen.words, None, _spans_of(write, mask) if spans else None, mask)
    return Seen(seen.words, *_tokens_of(write, seen.tokens, position), mask)


def _tokens_of(write: Writer, given: fx.Node, position: fx.Node | int) -> tuple[fx.Node, fx.Node]:
    """The 2-d mask as bool, and its bounds: once for all sites."""
    known, rows = write.low.tokens, rows_of_sequence(write.site)
    made_of = given, str(write.site.dims["S"]), rows
    if made_of not in known:
        queries, position = _queries(write), _early(write, position)
        with write.early(write.copy(given), queries, position):
            node = write.copy(given)
            node = node if example(given).dtype == torch.bool else write.call(operator.ne, node, 0)
            if rows > 1 and not is_one(shape_of(given)[0]):
                node = write.method("repeat_interleave", node, rows, 0)
            known[made_of] = node, write.op("token_bounds", node, position, queries)
    return known[made_of]


def _early(write: Writer, position: fx.Node | int) -> fx.Node | int:
    """Where this call's tokens begin, for nodes of all sites: the length of this site's past, or an input."""
    if not isinstance(position, fx.Node) or position.op == "placeholder":
        return position
    past = position.args[0]
    with write.early(past):
        return write.method("size", *position.args)


def _spans_of(write: Writer, mask: fx.Node | None) -> fx.Node:
    """A mask looked at: once for all sites."""
    spans = write.low.spans
    if mask not in spans:
        with write.early(mask):
            spans[mask] = write.op("mask_spans", mask)
    return spans[mask]


def _queries(write: Writer, letter: str = "S") -> fx.Node | int:
    """How many tokens the call has, or another size of the queries: of an input, if one is as long."""
    site = write.site
    at = site.core.axes.q.index(letter)
    count = shape_of(site.core.q)[at]
    if isinstance(count, int):
        return count
    found = write.low.input_of(count)
    if found is None:
        return write.method("size", write.copy(site.core.q), at)
    if found[1] is None:
        return found[0]
    with write.early(found[0]):
        return write.method("size", *found)


def _mask_of(write: Writer, position: fx.Node | int) -> fx.Node:
    """What was not proved as one mask."""
    site, masks = write.site, write.low.masks
    terms = [site.core.terms[at] for at in site.seen.read]
    regrouped_at = site.dims["Hq"] if any(is_regrouped(site, term) for term in terms) else None
    made_of = (site.core.terms, site.seen.read, str(site.dims["S"]), site.core.tiled, site.core.behind, regrouped_at)
    if made_of not in masks:
        made = [write.copy(term.node) for term in terms]
        rows = None if regrouped_at is None else _queries(write, "N")
        end = (position, _queries(write)) if site.key.update.form is CacheForm.BUFFER else ()
        with write.early(*made, *end, rows):
            mask = _joined(write, terms, rows)
            masks[made_of] = _front(write, mask, write.call(operator.add, *end)) if end else mask
    return masks[made_of]


def _front(write: Writer, mask: fx.Node, end: fx.Node) -> fx.Node:
    """The part of a mask over a buffer that is written."""
    if not write.site.seen.causal:
        return write.op("written", mask, end)
    if is_one(shape_of(mask)[-1]):
        return mask
    return write.call(torch.ops.kvpass.written.default, mask, end, check=False)  # the words hide what is not written


def _joined(write: Writer, terms: Sequence[Term], rows: fx.Node | int | None) -> fx.Node:
    """`rows`: sequences times heads, if some of the parts are grouped otherwise."""
    kept: fx.Node | None = None
    added: fx.Node | None = None
    for term in terms:
        node = _four_axes(write, term, rows)
        if term.kind is MaskKind.ADD:
            node = node if term.factor == 1.0 else write.call(operator.mul, node, term.factor)
            added = node if added is None else write.call(operator.add, added, node)
        else:
            node = write.call(operator.invert, node) if term.kind is MaskKind.HIDE else node
            kept = node if kept is None else write.call(operator.and_, kept, node)
    if added is None or kept is None:
        one = added if kept is None else kept
        assert one is not None
        return one
    return write.call(torch.where, kept, added, float("-inf"))


def _four_axes(write: Writer, term: Term, rows: fx.Node | int | None) -> fx.Node:
    """A term as [B, Hq, S, T], each axis of its full size or 1."""
    node, shape = write.copy(term.node), shape_of(term.node)
    behind = write.site.core.behind
    if behind and not is_one(shape[-1]):
        node = write.call(operator.getitem, node, (Ellipsis, slice(behind, None)))
    missing = len(term.axes) - len(shape)
    if missing:
        node = write.call(operator.getitem, node, (None,) * missing + (Ellipsis,))
    sizes = dict(zip(term.axes, (1,) * missing + tuple(shape), strict=True))
    site = write.site
    if is_regrouped(site, term):
        node = _of_rows(write, term, node, rows if is_one(sizes["B"]) else None)
        return regrouped(write, node, 1, to_model=False)
    if "N" in term.axes:
        heads = (1, 1) if sizes["N"] == 1 else (-1, site.dims["Hq"])
        node = write.method("unflatten", node, 0, heads)
    elif "G" in term.axes:
        if sizes["H"] != 1 or sizes["G"] != 1:
            node = write.method("expand", node, -1, site.dims["Hkv"], site.group, -1, -1)
        node = write.method("flatten", node, 1, 2)
    shared = (sizes["N"] if "N" in term.axes else sizes["H"]) == 1
    return node if shared else regrouped(write, node, 1, to_model=False)


def _of_rows(write: Writer, term: Term, node: fx.Node, rows: fx.Node | int | None) -> fx.Node:
    """A part of a mask of logits viewed as [B, *heads, S, T] as [B, Hq, S, T] of the site, whose sequences are rows of
    the view; `rows`: how many there are, if the mask is the same for all sequences of the view.
    """
    count = math.prod(term.heads)
    batch: fx.Node | int = -1
    if rows is not None:
        batch = rows // count if isinstance(rows, int) else write.call(operator.floordiv, rows, count)
    node = write.method("flatten", write.method("expand", node, batch, *term.heads, -1, -1), 0, len(term.heads))
    return write.method("unflatten", node, 0, (-1, write.site.dims["Hq"]))
