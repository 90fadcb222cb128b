"""The ops of one site, written in front of its core in the rewritten graph."""

from __future__ import annotations

import operator
from itertools import count
from typing import Any, Protocol

import torch
from torch import fx

import kvpass.ops  # noqa: F401  (registers torch.ops.kvpass)
from kvpass.match.calls import example
from kvpass.match.shapes import shape_of
from kvpass.plan import SitePlan
from kvpass.site import Half, Latent, Mixed, Reader, Term, UpProjection
from kvpass.terms import CacheForm, Layout, MaskKind, Phase


class Rewriting(Protocol):
    """What an emitter needs of the rewriting that it is a part of.

    Attributes:
        copy: from nodes of the captured graph to those of the new one.
        masks: masks of attentions over buffers, cut to what is written, by what they were made of.
        position: where this call's tokens are written into buffers; None if there are none.
        values: fake values of emitted nodes, shared by sites of equal shapes.
    """

    graph: fx.Graph
    copy: dict[fx.Node, fx.Node]
    values: dict[Any, Any]
    masks: dict[Any, fx.Node]
    position: fx.Node | None


class Emitter:
    """Writes the ops of one site in front of its core."""

    def __init__(self, lowering: Rewriting, planned: SitePlan, core: fx.Node, state: list[fx.Node]) -> None:
        self.low, self.graph, self.planned, self.core = lowering, lowering.graph, planned, core
        self.k, self.v, self.pos, self.stats, self.cursor = state
        self.rule = planned.rule.encode()
        self.number = count()
        site = planned.site
        self.q = self._queries()
        self.new_k, self.new_v = self._heads_first(site.key), self._heads_first(site.value)
        if site.core.latent is not None:
            self.q = self._absorbed(self.q, site.core.latent)
            self.new_k = self._call(torch.cat, [self.new_k, self.new_v], -1)
            self.new_v = self._call_method("narrow", self.new_k, -1, 0, 0)
        elif site.mixed is not None:
            self.q = self._spread(self.q, site.mixed)
            self.new_k, self.new_v = self._side_by_side(self.new_k), self._side_by_side(self.new_v)
        self.position = self._position()
        self.mask = self._mask()
        self.extras = self._extras()

    def decode(self) -> list[fx.Node]:
        """The output of each core."""
        args = (self.q, self.new_k, self.new_v, self.mask, self.k, self.v, self.pos, self.stats, self.cursor)
        scale = self.planned.site.core.scale
        latent = self.planned.site.core.latent
        extras = (*(self.extras or (None, 0.0)), latent.rank) if latent is not None else self.extras
        return self._outsides(self._op("decode_attend", *args, self.position, scale, self.rule, *extras))

    def multi(self) -> list[fx.Node]:
        """Prefill or extend: the output of each core."""
        k: Any = self.new_k
        v: Any = self.new_v
        pos = past_stats = None
        checked: tuple[fx.Node | None, ...] = ()
        if self.planned.site.phase is Phase.EXTEND:
            joined = self._op("join_slots", self.k, self.v, self.pos, self.stats, self.cursor, k, v, self.position)
            k, v, pos, past_stats = self._parts(joined, 4)
            checked = (self.mask,)
        core = self.planned.site.core
        values = v if core.latent is None else self._call_method("narrow", k, -1, 0, core.latent.rank)
        args = (self.q, k, values, pos, self.mask, core.scale, core.causal, self.rule, *self.extras)
        out, stats, valid = self._parts(self._op("prefill_attend", *args), 3)
        before = self.cursor, self.position, self.rule
        scored = self._op("score_slots", stats, past_stats, pos, valid, *before, *checked)
        score, stats, cursor = self._parts(scored, 3)
        capacity = self._call_method("size", self.k, 2)
        chosen = self._op("select_slots", score, cursor, capacity)
        self._op("compact_slots", k, v, pos, stats, chosen, cursor, self.k, self.v, self.pos, self.stats, self.cursor)
        return self._outsides(out)

    def _queries(self) -> fx.Node:
        """The core's queries as [B, Hq, S, D], in the dtype of the cache."""
        core = self.planned.site.core
        node, axes = self.low.copy[core.q], core.axes.q
        node = self._permuted(node, axes, _canonical(axes))
        if "N" in axes:
            node = self._call_method("unflatten", node, 0, (-1, self.planned.site.dims["Hq"]))
        elif "G" in axes:
            node = self._call_method("flatten", node, 1, 2)
        node = self._regrouped(node, 1, to_model=False)
        dtype = self.planned.site.dtype
        return node if example(core.q).dtype == dtype else self._call_method("to", node, dtype)

    def _outsides(self, node: fx.Node) -> list[fx.Node]:
        mixed = self.planned.site.mixed
        if mixed is None:
            return [self._outside(node)]
        heads = self._call_method("unflatten", node, 3, (mixed.heads, mixed.widths[1]))
        return [self._outside(self._picked(heads, reader)) for reader in mixed.readers]

    def _spread(self, q: fx.Node, mixed: Mixed) -> fx.Node:
        """[B, Hq, S, D] -> [B, Hq, S, heads * D]: each query in the place of the key head that it reads, else zeros."""
        one_hot = [[[float(at == head)] for at in range(mixed.heads)] for head in mixed.keys]
        places = self._constant(one_hot, example(q).dtype)
        places = self._call(operator.getitem, places, (slice(None), None))
        return self._call_method("flatten", self._call(operator.mul, self._call_method("unsqueeze", q, 3), places), 3)

    def _side_by_side(self, new: fx.Node) -> fx.Node:
        """[B, H, S, D] -> [B, 1, S, H * D]"""
        tokens_first = self._call_method("transpose", new, 1, 2)
        return self._call_method("unsqueeze", self._call_method("flatten", tokens_first, 2), 1)

    def _picked(self, heads: fx.Node, reader: Reader) -> fx.Node:
        """[B, Hq, S, heads, Dv] -> [B, Hq, S, blocks * Dv]: what each query head reads, block by block."""
        head = self._constant(list(map(list, zip(*reader.blocks, strict=True))), torch.int64)
        index = self._call(operator.getitem, head, (None, slice(None), None, slice(None), None))
        index = self._call_method("expand", index, *self._sizes_of(heads))
        return self._call_method("flatten", self._call_method("gather", heads, 3, index), 3)

    def _sizes_of(self, node: fx.Node) -> list[Any]:
        """Sizes of `node` for an expand, but for axis 3."""
        return [self._call_method("size", node, at) if at != 3 else -1 for at in range(len(shape_of(node)))]

    def _constant(self, values: Any, dtype: torch.dtype) -> fx.Node:
        device = example(self.planned.site.core.q).device
        node = self.graph.call_function(torch.tensor, (values,), {"dtype": dtype, "device": device})
        return self._described(node)

    def _outside(self, node: fx.Node) -> fx.Node:
        """The attention's output in the axes and the dtype that the model's own core gives."""
        site = self.planned.site
        axes = site.core.axes.out
        if site.core.latent is not None:
            weight = self._rows(site.core.latent.values)
            node = self._call(torch.matmul, node, self._call_method("transpose", weight, 1, 2))
        node = self._regrouped(node, 1, to_model=True)
        if "N" in axes:
            node = self._call_method("flatten", node, 0, 1)
        elif "G" in axes:
            node = self._call_method("unflatten", node, 1, (site.dims["Hkv"], site.group))
        node = self._permuted(node, _canonical(axes), axes)
        dtype = example(site.core.node).dtype
        return node if dtype == site.dtype else self._call_method("to", node, dtype)

    def _absorbed(self, q: fx.Node, latent: Latent) -> fx.Node:
        """Queries of latents: [q_nope W_k, q_rot], so that their product with [latent, k_rot] is that of q and k."""
        sizes = latent.keys.size, int(example(q).shape[-1]) - latent.keys.size
        starts = (0, sizes[0]) if latent.nope_first else (sizes[1], 0)
        nope, turned = (
            self._call_method("narrow", q, -1, at, size) for at, size in zip(starts, sizes, strict=True)
        )
        return self._call(torch.cat, [self._call(torch.matmul, nope, self._rows(latent.keys)), turned], -1)

    def _rows(self, up: UpProjection) -> fx.Node:
        """[heads, size, rank]"""
        weight = self._call_method("reshape", self.low.copy[up.weight], up.heads, up.width, -1)
        return self._call_method("narrow", weight, 1, up.start, up.size)

    def _permuted(self, node: fx.Node, axes: str, wanted: str) -> fx.Node:
        return node if axes == wanted else self._call_method("permute", node, *(axes.index(x) for x in wanted))

    def _extras(self) -> tuple[Any, ...]:
        core = self.planned.site.core
        if core.sinks is None and not core.softcap:
            return ()
        sinks = self._call_method("reshape", self.low.copy[core.sinks], -1) if core.sinks is not None else None
        return sinks if sinks is None else self._regrouped(sinks, 0, to_model=False), core.softcap

    def _regrouped(self, node: fx.Node, axis: int, to_model: bool) -> fx.Node:
        """Query heads of a core with tiled KV heads, from the model's order to that of the ops or back."""
        site = self.planned.site
        if not site.core.tiled:
            return node
        sizes = (site.group, int(site.dims["Hkv"]))
        node = self._call_method("unflatten", node, axis, sizes[::-1] if to_model else sizes)
        return self._call_method("flatten", self._call_method("transpose", node, axis, axis + 1), axis, axis + 1)

    def _heads_first(self, half: Half) -> fx.Node:
        node = self.low.copy[half.update.new]
        return node if half.layout is Layout.BHTD else self._call_method("transpose", node, 1, 2)

    def _mask(self) -> fx.Node | None:
        """One mask of all terms, 4-d: bool, or float if something is added. Over a buffer, of what is written."""
        site = self.planned.site
        if site.key.update.form is not CacheForm.BUFFER or not site.core.terms:
            return self._joined_mask()
        made_of = (site.core.terms, str(site.dims["S"]), site.core.tiled)
        if made_of not in self.low.masks:
            new = self._call_method("size", self.low.copy[site.key.update.new], site.key.layout.token_axis)
            end = self._call(operator.add, self.position, new)
            mask = self._joined_mask()
            self.low.masks[made_of] = self._op("written", mask, end)
        return self.low.masks[made_of]

    def _joined_mask(self) -> fx.Node | None:
        kept: fx.Node | None = None
        added: fx.Node | None = None
        for term in self.planned.site.core.terms:
            node = self._mask4(term)
            if term.kind is MaskKind.ADD:
                node = node if term.factor == 1.0 else self._call(operator.mul, node, term.factor)
                added = node if added is None else self._call(operator.add, added, node)
            else:
                node = self._call(operator.invert, node) if term.kind is MaskKind.HIDE else node
                kept = node if kept is None else self._call(operator.and_, kept, node)
        if added is None or kept is None:
            return added if kept is None else kept
        return self._call(torch.where, kept, added, float("-inf"))

    def _mask4(self, term: Term) -> fx.Node:
        node, shape = self.low.copy[term.node], shape_of(term.node)
        missing = len(term.axes) - len(shape)
        if missing:
            node = self._call(operator.getitem, node, (None,) * missing + (Ellipsis,))
        sizes = dict(zip(term.axes, (1,) * missing + tuple(shape), strict=True))
        site = self.planned.site
        if "N" in term.axes:
            heads = (1, 1) if sizes["N"] == 1 else (-1, site.dims["Hq"])
            node = self._call_method("unflatten", node, 0, heads)
        elif "G" in term.axes:
            if sizes["H"] != 1 or sizes["G"] != 1:
                node = self._call_method("expand", node, -1, site.dims["Hkv"], site.group, -1, -1)
            node = self._call_method("flatten", node, 1, 2)
        shared = (sizes["N"] if "N" in term.axes else sizes["H"]) == 1
        return node if shared else self._regrouped(node, 1, to_model=False)

    def _position(self) -> fx.Node | int:
        half = self.planned.site.key
        if self.planned.site.phase is Phase.PREFILL:
            return 0
        assert half.update.past is not None
        if half.update.form is CacheForm.BUFFER:
            assert self.low.position is not None
            return self.low.position
        return self._call_method("size", self.low.copy[half.update.past], half.layout.token_axis)

    def _op(self, name: str, *args: Any) -> fx.Node:
        return self._call(getattr(torch.ops.kvpass, name).default, *args)

    def _parts(self, node: fx.Node, count: int) -> list[fx.Node]:
        return [self._call(operator.getitem, node, at) for at in range(count)]

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self._described(self.graph.call_function(target, args))

    def _call_method(self, name: str, *args: Any) -> fx.Node:
        return self._described(self.graph.call_method(name, args))

    def _described(self, node: fx.Node) -> fx.Node:
        """Give a new node its source, its site and its fake value."""
        node.meta.update(
            {key: self.core.meta[key] for key in ("stack_trace", "nn_module_stack") if key in self.core.meta}
        )
        node.meta["kvpass"] = {"site": self.planned.site.name, "layer": self.planned.site.layer}
        node.meta["example_value"] = self._value(node)
        return node

    def _value(self, node: fx.Node) -> Any:
        """Fake value of a new node. Sites of equal shapes emit equal sequences, so each value is computed once per
        graph.
        """
        site = self.planned.site
        masks = [(shape_of(term.node), term.kind, term.factor, example(term.node).dtype) for term in site.core.terms]
        core = site.core
        kind: tuple[Any, ...] = site.dtype, str(site.dims), str(masks), core.axes, str(core.softcap), core.scale
        kind += (str(core.latent), str(site.mixed))
        key = (self.rule, site.phase, *kind, site.key.layout, site.value.layout, next(self.number))
        if key not in self.low.values:
            args = fx.map_arg(node.args, lambda n: example(n))
            with example(site.core.q).fake_mode:
                call = getattr(args[0], node.target) if node.op == "call_method" else node.target  # type: ignore[arg-type]
                self.low.values[key] = call(*(args[1:] if node.op == "call_method" else args), **node.kwargs)  # type: ignore[operator]
        return self.low.values[key]


def _canonical(axes: str) -> str:
    """The order of axes in which an op takes queries and gives outputs."""
    return "".join(letter for letter in "NBHGSD" if letter in axes)
