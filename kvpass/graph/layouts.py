"""How K or V lies in the tensor that a host caches, read from the views down to what an attention reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import call_name
from kvpass.graph.factor_steps import STEPS
from kvpass.graph.factors import Axis, Factor, Factors
from kvpass.graph.miss import Miss
from kvpass.graph.shapes import is_one, same, shape_of
from kvpass.graph.views import front_axes, is_front
from kvpass.terms import Layout, Piece

WHOLE = "let it read all that is cached"


class Written:
    """The views of a chain that take the written part of a buffer.

    Args:
        token: the axis of the buffer's tokens.
        new: sizes of what is written into it.

    Attributes:
        parts: those met, each with the axis of its tokens, or None for one that only leaves out other rows.
    """

    def __init__(self, token: int | None, new: Sequence[Any]) -> None:
        self.token, self.new = token, new
        self.parts: dict[fx.Node, int | None] = {}

    def __call__(self, axes: Sequence[Axis], node: fx.Node) -> bool:
        """Does a view only shorten the tokens, or leave out rows behind those of the call?"""
        if not is_front(node):
            return False
        after, token = shape_of(node), None
        for at in front_axes(node):
            (factor,) = axes[at] if len(axes[at]) == 1 else (None,)
            if factor is None or factor.root is None:
                return False
            if factor.root == self.token:
                token = at
            elif not same(after[at], self.new[factor.root]) or same(factor.size, self.new[factor.root]):
                return False
        self.parts[node] = token
        return True


@dataclass
class _Roles:
    """Factors of what an attention reads, by the axes that it reads."""

    batch: Factor | None = None
    token: Factor | None = None
    heads: Axis = ()
    entries: Axis = ()


def read_layout(
    base: fx.Node,
    chain: Sequence[fx.Node],
    axis: int | None = None,
    roles: str = "BHTD",
    tiled: bool = False,
    written: Written | None = None,
) -> Layout:
    """Layout of `base` if the chain turns it into what the attention reads, with grouped heads in the right order.

    Args:
        axis: the axis along which the cache grows, if known; it decides where sizes of one leave the order open.
        roles: axes that the attention reads, `BHTD`, `BHDT`, `NTD`, `BHGTD`, `BTD`, ...; see `kvpass.sites.site.Axes`.
        tiled: the right order is query head h reading KV head h % Hkv.
        written: of a buffer, whose written part may be all that is read.

    Raises:
        Miss: LAYOUT, GROUP_ORDER or UNSUPPORTED_ATTENTION (only a part of the tokens is read), with the view that
        breaks it.
    """
    factors = Factors(base, STEPS)
    unknown = factors.follow(base, chain, written)
    last = chain[-1] if chain else base
    if unknown is not None and call_name(unknown) in ("getitem", "slice", "narrow", "select"):
        raise Miss(Reason.UNSUPPORTED_ATTENTION, unknown, f"the attention reads only a part of {base.name}", hint=WHOLE)
    if unknown is not None:
        raise Miss(Reason.LAYOUT, unknown, f"views between cache and attention do not end in {roles}")
    if len(factors.axes) != len(roles):
        raise Miss(Reason.LAYOUT, last, f"views between cache and attention do not end in {roles}")
    found = _assigned(factors, roles, tiled, axis, last)
    return _layout(base, factors, found, last)


def is_tiled(
    base: fx.Node, chain: Sequence[fx.Node], axis: int | None, roles: str, written: Written | None = None
) -> bool:
    """Does query head h read KV head h % Hkv?"""
    try:
        read_layout(base, chain, axis, roles, written=written)
    except Miss as miss:
        return miss.reason is Reason.GROUP_ORDER
    return False


def _assigned(factors: Factors, roles: str, tiled: bool, axis: int | None, last: fx.Node) -> _Roles:
    found, copies = _Roles(), 0
    for role, parts in zip(roles, factors.axes, strict=True):
        real = tuple(f for f in parts if f.root is not None)
        copies += len(parts) > len(real)
        wide = tuple(f for f in real if not is_one(f.size))
        if role == "B":
            found.batch = _one(wide, real, last, role)
        elif role == "T":
            found.token = _one(wide, real, last, role)
        elif role == "N":
            if not wide and not real:
                raise _no_fit(last, roles)
            found.batch, found.heads = (wide or real)[0], (wide or real)[1:]
            _check_copies(parts, tiled, last, 1)
        elif role == "H":
            found.heads = wide
            _check_copies(parts, tiled, last, 0)
        elif role == "D":
            found.entries = wide
        if (role in "BTD" and len(parts) > len(real)) or (role == "G" and real and wide):
            raise _no_fit(last, roles)
    if copies > 1:
        raise _no_fit(last, roles)
    _settle_ones(factors, found, roles, axis)
    if found.token is None or found.batch is None:
        raise _no_fit(last, roles)
    return found


def _no_fit(last: fx.Node, roles: str) -> Miss:
    return Miss(Reason.LAYOUT, last, f"views between cache and attention do not end in {roles}")


def _one(wide: Axis, real: Axis, last: fx.Node, role: str) -> Factor | None:
    """The only factor of an axis; None if its size is one, and it may be any."""
    if len(wide) > 1:
        raise Miss(Reason.LAYOUT, last, f"several axes of the cache are joined in axis {role} of the attention")
    return wide[0] if wide else None


def _check_copies(parts: Axis, tiled: bool, last: fx.Node, before: int) -> None:
    """Copies of heads stand behind them, or before them if tiled. `before`: wide factors that are no heads."""
    wide = [f for f in parts if f.root is None or not is_one(f.size)]
    at = [place for place, f in enumerate(wide) if f.root is None]
    heads = [place for place, f in enumerate(wide) if f.root is not None and place >= before]
    if not at or not heads:
        return
    if len(at) > 1:
        raise Miss(Reason.LAYOUT, last, "KV heads are repeated twice")
    if (at[0] > heads[0]) is tiled or heads[0] < at[0] < heads[-1]:
        here = ("interleaved", "tiled (repeat)") if tiled else ("tiled (repeat)", "interleaved")
        raise Miss(Reason.GROUP_ORDER, last, f"KV heads are {here[0]}, not {here[1]}")


def _settle_ones(factors: Factors, found: _Roles, roles: str, axis: int | None) -> None:
    """Axes of size one that stand for sequences or tokens: where they went, or the first that is left."""
    taken = {f.root for f in (found.batch, found.token) if f is not None}
    for role in ("T", "B"):
        if (found.token if role == "T" else found.batch) is not None:
            continue
        here = roles.index(role) if role in roles else roles.index("N")
        own = [f.root for f in factors.axes[here] if f.root is not None and is_one(f.size)]
        ones = [at for at, parts in enumerate(factors.roots) if len(parts) == 1 and is_one(parts[0].of)]
        wanted = [axis] if role == "T" and axis is not None else []
        root = next((at for at in (*wanted, *own, *ones) if at in ones and at not in taken), None)
        if root is None:
            continue
        taken.add(root)
        if role == "T":
            found.token = factors.roots[root][0]
        else:
            found.batch = factors.roots[root][0]


def _layout(base: fx.Node, factors: Factors, found: _Roles, last: fx.Node) -> Layout:
    assert found.batch is not None
    assert found.token is not None
    for factor, what in ((found.token, "tokens"), (found.batch, "sequences")):
        assert factor.root is not None
        if len(factors.roots[factor.root]) != 1:
            raise Miss(Reason.LAYOUT, last, f"{what} share axis {factor.root} of {base.name} with something else")
        if not factor.whole:
            detail = f"the attention reads only a part of {base.name}: not all of its {what}"
            raise Miss(Reason.UNSUPPORTED_ATTENTION, last, detail, hint=WHOLE)
    batch, token = found.batch.root, found.token.root
    sizes = shape_of(base)
    plain = _plain(base, factors, found)
    if plain is not None:
        return plain
    axes: list[str | int] = []
    for at, size in enumerate(sizes):
        if at not in (batch, token) and not isinstance(size, int):
            raise Miss(Reason.LAYOUT, base, f"axis {at} of a cached tensor of shape {tuple(sizes)} is no constant")
        axes.append("B" if at == batch else "T" if at == token else size)
    flat = [f for parts in factors.roots for f in parts]
    own = [at for at, f in enumerate(flat) if f.root not in (batch, token)]
    heads, entries = ([flat.index(f) for f in parts] for parts in (found.heads, found.entries))
    rest = [at for at in own if at not in (*heads, *entries)]
    if any(not is_one(flat[at].size) for at in rest) or any(flat[at].root in (batch, token) for at in heads + entries):
        raise Miss(Reason.LAYOUT, last, "a part of the cached tensor is in no axis of the attention")
    piece = Piece(
        splits=tuple((0,) if at in (batch, token) else tuple(f.of for f in p) for at, p in enumerate(factors.roots)),
        cuts=tuple((at, flat[at].start, flat[at].size) for at in own if not flat[at].whole),
        order=(flat.index(found.batch), *rest, *heads, flat.index(found.token), *entries),
        head_axes=len(rest) + len(heads),
        heads=math.prod(flat[at].size for at in heads),
        entries=math.prod(flat[at].size for at in entries),
    )
    return Layout(tuple(axes), piece)


def _plain(base: fx.Node, factors: Factors, found: _Roles) -> Layout | None:
    """The cache is [B, H, T, D] or [B, T, H, D]."""
    sizes = shape_of(base)
    if len(sizes) != 4 or any(len(parts) != 1 or not parts[0].whole for parts in factors.roots):
        return None
    assert found.batch is not None
    assert found.token is not None
    token = found.token.root
    if found.batch.root != 0 or token not in (1, 2):
        return None
    last, heads = factors.roots[3][0], factors.roots[3 - token][0]
    entries_fit = found.entries == (last,) or (not found.entries and is_one(last.size))
    heads_fit = found.heads == (heads,) or (not found.heads and is_one(heads.size))
    return (Layout.BTHD if token == 1 else Layout.BHTD) if entries_fit and heads_fit else None
