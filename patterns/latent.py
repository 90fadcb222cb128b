"""Multi-head latent attention (DeepSeek): the cache holds one latent and one rotated key per token, and keys and values
of all heads are made from them anew in each call.

    X = W latent, split by head into [k_nope | v];  k = [k_nope | k_rot];  attention(q, k, v)

is turned into attention over the cached tensors themselves, with one KV head (the absorbed form, DeepSeek-V2, arXiv
2405.04434, section 2.1.2): (q_nope W_k) latent + q_rot k_rot are the same logits, and (p latent) W_v the same output.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from kvpass.graph.calls import argument, call_name, operand
from kvpass.graph.layouts import read_layout
from kvpass.graph.miss import Miss
from kvpass.graph.shapes import is_one, normal_dim, same, shape_of
from kvpass.graph.views import walk_up
from kvpass.sites.site import Axes, Core, Latent, UpProjection
from kvpass.terms import Layout

Part = tuple[fx.Node, int]
"""A piece of the last axis and its width."""


class LatentAttention:
    name = "latent"

    def match(self, core: Core) -> Core | None:
        """The same attention over cached latents; None if keys and values are not made from any."""
        passed: list[fx.Node] = []
        keys, values = (_base(node, roles, passed) for node, roles in ((core.k, core.axes.k), (core.v, core.axes.v)))
        if keys is None or values is None:
            return None
        parts = _parts(keys, passed)
        up_v = _up(values, passed)
        if len(parts) != 2 or up_v is None:
            return None
        ups = [_up(node, passed) for node, _ in parts]
        at = 0 if ups[0] is not None else 1
        up_k, turned = ups[at], _turned(parts[1 - at][0], passed)
        if up_k is None or turned is None or up_k[0] is not up_v[0]:
            return None
        latent = Latent(up_k[1], up_v[1], nope_first=at == 0, rank=int(shape_of(up_k[0])[-1]))
        order = {node: at for at, node in enumerate(core.node.graph.nodes)}
        inner = sorted({*passed, *core.inner} - {up_k[0], turned}, key=order.__getitem__)
        axes = Axes(core.axes.q, "BHTD", "BHTD", core.axes.out)
        return replace(core, k=up_k[0], v=turned, axes=axes, latent=latent, inner=tuple(inner))


def _base(node: fx.Node, roles: str, passed: list[fx.Node]) -> fx.Node | None:
    """What an operand is a view of, if it is [B, H, T, D] there."""
    base, chain = walk_up(node, lambda n: False)
    if len(shape_of(base)) != 4 or not _lands(base, chain, roles):
        return None
    passed += [*chain, base]
    return base


def _lands(base: fx.Node, chain: tuple[fx.Node, ...], roles: str) -> bool:
    """Does a chain turn [B, H, T, D] into the axes that an attention reads?"""
    try:
        return read_layout(base, chain, 2, roles) == Layout.BHTD
    except Miss:
        return False


def _parts(node: fx.Node, passed: list[fx.Node]) -> list[Part]:
    """The pieces that a tensor is put together from along its last axis: by `cat`, or copied into an empty one."""
    if call_name(node) == "cat" and normal_dim(argument(node, 1, "dim", 0), 4) == 3:
        return [(part, shape_of(part)[-1]) for part in argument(node, 0, "tensors")]
    if call_name(node) not in ("new_empty", "empty"):
        return []
    found: dict[int, Part] = {}
    for view in node.users:
        writes = [user for user in view.users if call_name(user) == "copy_" and operand(user) is view]
        if call_name(view) == "getitem" and len(writes) == 1:
            start, piece = _start(view), writes[0].args[1]
            if start is not None and isinstance(piece, fx.Node):
                found[start] = piece, shape_of(view)[-1]
                passed += [view, writes[0]]
    places, end = sorted(found), 0
    for at in places:
        if at != end:
            return []
        end += found[at][1]
    return [found[at] for at in places] if same(end, shape_of(node)[-1]) else []


def _start(view: fx.Node) -> int | None:
    """Where `x[..., a:b]` begins."""
    index = view.args[1]
    if not isinstance(index, tuple) or not isinstance(index[-1], slice):
        return None
    whole = all(item is Ellipsis or item == slice(None, None, None) for item in index[:-1])
    start = index[-1].start or 0
    return start if whole and isinstance(start, int) and start >= 0 and index[-1].step in (None, 1) else None


def _up(node: fx.Node, passed: list[fx.Node]) -> tuple[fx.Node, UpProjection] | None:
    """The cached latent and the rows of the projection, if `node` is `split(view(linear(latent)))` by head."""
    seen: list[fx.Node] = []
    piece = _slice(node, seen)
    if piece is None:
        return None
    whole, start = piece
    view = operand(whole) if call_name(whole) == "transpose" else whole
    linear = operand(view) if call_name(view) == "reshape" else None
    if not isinstance(linear, fx.Node) or call_name(linear) != "linear" or argument(linear, 2, "bias") is not None:
        return None
    latent, weight = operand(linear), argument(linear, 1, "weight")
    heads, width = shape_of(whole)[1], shape_of(whole)[3]
    rows = shape_of(weight)[0]
    per_head = len(shape_of(view)) == 4 and same(shape_of(view)[2], heads) and same(shape_of(view)[3], width)
    turned = [shape_of(view)[at] for at in (0, 2, 1, 3)] if per_head else []
    fits = per_head and all(same(a, b) for a, b in zip(turned, shape_of(whole), strict=True))
    if not fits or len(shape_of(latent)) != 4 or not is_one(shape_of(latent)[1]) or not same(rows, heads * width):
        return None
    passed += [*seen, whole, view, linear]
    return latent, UpProjection(weight, int(heads), int(width), start, int(shape_of(node)[-1]))


def _slice(node: fx.Node, seen: list[fx.Node]) -> tuple[fx.Node, int] | None:
    """What a node is a piece of, along the last axis, and where it begins."""
    if call_name(node) != "getitem":
        return None
    seen.append(node)
    source: Any = operand(node)
    if call_name(source) not in ("split", "split_with_sizes"):
        start = _start(node)
        return (source, start) if start is not None else None
    seen.append(source)
    sizes = argument(source, 1, "split_size_or_sections", argument(source, 1, "split_sizes"))
    dim = argument(source, 2, "dim", 0)
    whole = operand(source)
    if normal_dim(dim, len(shape_of(whole))) != 3 or not isinstance(node.args[1], int):
        return None
    if isinstance(sizes, int):
        return whole, sizes * node.args[1]
    return whole, sum(sizes[: node.args[1]])


def _turned(node: fx.Node, passed: list[fx.Node]) -> fx.Node | None:
    """The cached rotated key, one for all heads."""
    base, chain = walk_up(node, lambda n: is_one(shape_of(n)[1]) if len(shape_of(n)) == 4 else False)
    if len(shape_of(base)) != 4 or not is_one(shape_of(base)[1]) or any(call_name(n) != "expand" for n in chain):
        return None
    passed += chain
    return base
