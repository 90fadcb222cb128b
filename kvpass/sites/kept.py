"""What a graph keeps of keys and values that no update explains: parts of one tensor, what they are projected from,
what they were before or after a change.

A first call shows no past, so a cache in such a form would pass for none at all, and the whole prompt would run dense
before the next call says so. Here it is seen in the prompt's graph: a value with the call's tokens that the graph
returns, or writes into an input. Hidden states (`output_hidden_states=True`) are such values too, but queries are made
from them as well; and what an encoder returns is another sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import PROJECTIONS, argument, call_name, changes, example, is_input, is_metadata, operand
from kvpass.graph.dataflow import Flow
from kvpass.graph.miss import Miss
from kvpass.graph.nearby import COPIES, SLICES, whole
from kvpass.graph.pools import writes_rows
from kvpass.graph.projections import foreign
from kvpass.graph.shapes import same, shape_of
from kvpass.graph.views import is_view
from kvpass.graph.windows import keeps_the_end
from kvpass.sites.site import Core

ATTENTIONS = frozenset({"sdpa", "sdpa_aten", "flex_attention", "softmax"})
PARTS = SLICES | {"unbind", "split_with_sizes"}
JOINS = frozenset({"cat", "stack"})
LIMIT = 200
ESCAPES = Reason.KEY_ESCAPES, Reason.VALUE_ESCAPES


def kept_otherwise(flow: Flow, core: Core, bases: Sequence[fx.Node]) -> Miss | None:
    """Why the cache of an attention is none that kvpass serves, if neither its keys nor its values are known to be
    cached; None if nothing is kept of them.
    """
    both = packed(flow, bases)
    if both is not None or foreign(core.q, bases[0]):
        return both
    joined = _joined(flow, bases[0])
    if joined is not None:
        return joined
    key, value = (half_otherwise(flow, core, bases, at) for at in (0, 1))
    if key is None and value is not None:
        key = _turned_later(flow, core, bases[0])
    if key is None or value is None:
        return None
    key.reads += value.reads
    return key


def _joined(flow: Flow, base: fx.Node) -> Miss | None:
    """Keys that are joined with others, of no token, before the attention reads them."""
    parts = argument(base, 0, "tensors") if call_name(base) == "cat" else ()
    tops = {part: next(reversed([*_wholes(part)])) for part in parts if isinstance(part, fx.Node)}
    cached = [part for part in tops if part in flow.outputs and part.op != "placeholder"]
    others = [part for part, top in tops.items() if part not in cached and top.op in ("placeholder", "get_attr")]
    if not cached or not others:
        return None
    what = f"the attention reads {cached[0].name} joined with {others[0].name}, which are keys of no token"
    hint = "memory in front of the cache must be made of nn.Parameters alone: torch.cat([memory, cached], dim)"
    return Miss(Reason.UNSUPPORTED_ATTENTION, base, what, (cached[0],), hint)


def _turned_later(flow: Flow, core: Core, base: fx.Node) -> Miss | None:
    """Keys that are stored in another form, as their values are, and rotated only after that."""
    tokens = dict(zip(core.axes.k, shape_of(core.k), strict=False)).get("T")
    for above in _above(base):
        if call_name(above) in PROJECTIONS or flow.between(above, core.q):
            return None
        if is_kept(flow, above, tokens):
            return change_between(flow, above, base, Reason.KEY_ESCAPES)
    return None


def packed(flow: Flow, bases: Sequence[fx.Node]) -> Miss | None:
    """Keys and values that are parts of one tensor, which is kept whole."""
    tops = [next((n for n in _wholes(base) if n in flow.outputs and n.op != "placeholder"), None) for base in bases]
    kept = tops[0]
    if kept is None or kept is not tops[1] or kept in bases or bases[0] is bases[1]:
        return None
    return Miss(Reason.PACKED_CACHE, bases[0], f"keys and values are parts of {kept.name}, which is cached", (kept,))


def half_otherwise(flow: Flow, core: Core, bases: Sequence[fx.Node], at: int) -> Miss | None:
    """What is kept of the keys (0) or values (1), in another form than the attention reads."""
    base = bases[at]
    tokens = dict(zip((core.axes.k, core.axes.v)[at], shape_of((core.k, core.v)[at]), strict=False)).get("T")
    tokens = tokens if tokens is None else tokens - core.behind
    what = ("keys", "values")[at]
    for kept in _above(base):
        if kept in flow.outputs and _holds(kept, tokens) and not flow.between(kept, core.q):
            return change_between(flow, kept, base, ESCAPES[at])
    if flow.between(base, core.q):
        return None
    for kept in _below(base, bases):
        if kept in flow.outputs and (_holds(kept, tokens) or _is_window(kept, tokens)):
            return _stored(kept, base, tokens, what)
        if _written_elsewhere(flow, kept):
            if writes_rows(kept):
                what = f"{call_name(kept)} puts them into rows of a pool, in places that a table says"
                return Miss(Reason.PAGED_CACHE, kept, what)
            detail = f"the attention reads {base.name} itself, not the buffer that {call_name(kept)} writes it into"
            hint = f"write first, then attend to the {what} in the buffer: buf[:, :, :end], or all of it under a mask"
            return Miss(Reason.UNSUPPORTED_UPDATE, kept, detail, hint=hint)
    return None


def is_kept(flow: Flow, base: fx.Node, tokens: Any) -> bool:
    """Is a value with this many tokens, made of keys or values alone or put together with others, returned or written
    into an input?
    """
    below = _below(base, (base,))
    return any((kept in flow.outputs and _holds(kept, tokens)) or _written_elsewhere(flow, kept) for kept in below)


def change_between(flow: Flow, cache: fx.Node, base: fx.Node, reason: Reason) -> Miss | None:
    """What is done to a cache before the attention reads it."""
    between = sorted(flow.between(cache, base) - {cache}, key=flow.order.__getitem__)
    for node in between:
        if call_name(node) in PROJECTIONS:
            detail = f"{call_name(node)} makes keys and values from {cache.name} anew in each call"
            return Miss(Reason.PROJECTED_CACHE, node, detail, (cache,))
    for node in between:
        if call_name(node) not in PARTS and not is_view(node) and not is_metadata(node) and not _makes(node):
            what = "keys" if reason is Reason.KEY_ESCAPES else "values"
            hint = f"cache the {what} as the attention reads them: rotate, scale or convert them before they are cached"
            return Miss(
                reason, node, f"{call_name(node)} changes {cache.name} before the attention reads it", (cache,), hint
            )
    if not between:
        return None
    hint = "let the attention read all that is cached"
    return Miss(
        Reason.UNSUPPORTED_ATTENTION, between[-1], f"the attention reads only a part of {cache.name}", (cache,), hint
    )


def _stored(kept: fx.Node, base: fx.Node, tokens: Any, what: str) -> Miss:
    if _is_window(kept, tokens):
        return Miss(Reason.SLIDING_WINDOW, kept, f"the cache takes only the end of {base.name}")
    detail = f"not {base.name} itself is stored, but {call_name(kept)} of it"
    return Miss(
        Reason.UNSUPPORTED_UPDATE, kept, detail, hint=f"return the {what} that the attention reads, as they are"
    )


def _is_window(node: fx.Node, tokens: Any) -> bool:
    whole_sizes = enumerate(shape_of(operand(node)))
    return any(same(size, tokens) and keeps_the_end(node, axis) for axis, size in whole_sizes)


def _holds(node: fx.Node, tokens: Any) -> bool:
    sizes = shape_of(node)
    return node.op != "placeholder" and len(sizes) >= 3 and any(same(size, tokens) for size in sizes)


def _wholes(base: fx.Node) -> Iterator[fx.Node]:
    """A value and what it is a view or a part of, `unbind` and `split` with sizes too."""
    for node in whole(base):
        yield node
    while (call_name(node) in PARTS or is_view(node)) and isinstance(operand(node), fx.Node):
        node = operand(node)
        yield node


def _above(base: fx.Node) -> Iterator[fx.Node]:
    """What a value is made from, nearest first, short of other attentions."""
    queue, seen = [base], {base}
    for node in queue:
        fresh = [n for n in node.all_input_nodes if n not in seen and _is_wide(n) and call_name(n) not in ATTENTIONS]
        yield from fresh
        seen.update(fresh)
        queue += fresh[: max(0, LIMIT - len(queue))]


def _below(base: fx.Node, bases: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """What is made of keys and values alone, or put together with those of other layers, short of projections and
    attentions; and what writes it somewhere.
    """
    queue, seen = [base], {*bases}
    for node in queue:
        for user in node.users:
            if user in seen or is_metadata(user) or call_name(user) in PROJECTIONS | ATTENTIONS:
                continue
            yield user
            alone = call_name(user) in JOINS or {n for n in _data(user) if _is_wide(n)} <= seen
            if _is_wide(user) and len(queue) < LIMIT and alone:
                seen.add(user)
                queue.append(user)


def _data(user: fx.Node) -> list[fx.Node]:
    """Inputs whose numbers a node reads: of `y.type_as(x)`, none of `x`."""
    return [operand(user)] if call_name(user) == "type_as" else user.all_input_nodes


def _written_elsewhere(flow: Flow, write: fx.Node) -> bool:
    """Does a node write one tensor into another, which is an input or is returned?"""
    if not (changes(write) or call_name(write) in COPIES) or not isinstance(operand(write), fx.Node):
        return False
    homes = [*whole(operand(write)), write]
    return len(_wides(write)) > 1 and any(is_input(home) or home in flow.outputs for home in homes)


def _wides(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if _is_wide(n)]


def _is_wide(node: fx.Node) -> bool:
    """Three or more dimensions, or several tensors."""
    return len(shape_of(node)) >= 3 or (isinstance(example(node), (tuple, list)) and _tensors(example(node)))


def _tensors(values: Any) -> bool:
    return any(isinstance(value, torch.Tensor) for value in values)


def _makes(node: fx.Node) -> bool:
    """A tensor like another one, none of whose numbers it reads."""
    return call_name(node).startswith("new_") or call_name(node).endswith("_like")
