"""Frozen facts about one attention and its cache update in one captured graph, and about those that were declined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import call_name, changes, operand, unused_sizes
from kvpass.graph.nearby import taken_out
from kvpass.graph.visibility import Visibility
from kvpass.sites.refined import Joined, Latent, Memory, UpProjection
from kvpass.terms import CacheForm, Layout, MaskKind, Phase

__all__ = [
    "Axes",
    "Core",
    "End",
    "Half",
    "Joined",
    "Latent",
    "Memory",
    "Mixed",
    "Reader",
    "Site",
    "Term",
    "UpProjection",
    "Update",
]


@dataclass(frozen=True)
class Term:
    """One part of a mask.

    Attributes:
        node: a value that broadcasts to the logits.
        kind: added to the logits (times `factor`), or bool: True is kept, or True is hidden.
        axes: of the logits where it is applied, by letter (see `Axes`).
        factor: that an added part is multiplied by.
        heads: sizes of the axes `H` or `HG` of the logits where it is applied; () if they are the core's own.
    """

    node: fx.Node
    kind: MaskKind
    axes: str = "BHST"
    factor: float = 1.0
    heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class Axes:
    """Axis order of a core's operands by letter: `B` sequences, `H` heads, `S` queries, `T` keys, `D` head dimension,
    `G` query heads of one KV head, `N` sequences and heads in one axis.

    Attributes:
        q, k, v, out: of the queries, keys, values and the attention's output.
    """

    q: str = "BHSD"
    k: str = "BHTD"
    v: str = "BHTD"
    out: str = "BHSD"


@dataclass(frozen=True)
class Core:
    """An attention core in normal form: `softmax(cap(q k^T * scale) + terms) v`, where `cap(x) = softcap * tanh(x /
    softcap)` (0: none) and `sinks` are logits that only the softmax's denominator sees.

    Attributes:
        node: the attention's last node.
        q, k, v: operands as the core reads them, before any view is looked through; float32, bfloat16 or float16, with
            the axes that `axes` names.
        terms: the parts of the mask, in the order in which they are applied.
        scale: that q k^T is multiplied by.
        causal: whether a causal mask comes on top (`is_causal` of SDPA).
        pattern: who found it.
        axes: order of the operands' axes.
        softcap: 0.0 for none.
        sinks: a node [Hq] of logits, or None.
        inner: nodes between the operands and `node`, which are taken out of the graph with it.
        latent: set if `k` are latents and `v` rotated keys, and keys and values are made from them.
        tiled: query head h reads KV head `h % Hkv`, not `h // group`.
        memory: set if `k` and `v` begin with keys and values of no token, which all queries see; columns of `terms`
            are theirs first.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    terms: tuple[Term, ...]
    scale: float
    causal: bool
    pattern: str
    axes: Axes = Axes()
    softcap: float = 0.0
    sinks: fx.Node | None = None
    inner: tuple[fx.Node, ...] = ()
    latent: Latent | None = None
    tiled: bool = False
    memory: Memory | None = None

    @property
    def behind(self) -> int:
        """How many columns of its masks stand in front of the cache's first."""
        return 0 if self.memory is None else self.memory.count

    @property
    def cached(self) -> tuple[fx.Node, fx.Node]:
        """What of keys and values is to be cached."""
        return (self.k, self.v) if self.memory is None else (self.memory.k.cached, self.memory.v.cached)

    def joins(self, at: int) -> tuple[fx.Node, ...]:
        """From the `cat` with a memory down to the keys (0) or values (1); none without one."""
        if self.memory is None:
            return ()
        joined = (self.memory.k, self.memory.v)[at]
        return joined.node, *joined.views

    @property
    def mask(self) -> fx.Node | None:
        """The first part of the mask, for people; `terms` has them all."""
        return self.terms[0].node if self.terms else None


@dataclass(frozen=True)
class Update:
    """A cache update.

    Attributes:
        node: the value that becomes the cache.
        new: this call's keys or values.
        past: the graph input that they are appended to or written into; None in a first call.
        axis: along which they are appended; None if the call's tokens are the cache.
        form: how it is spelled.
        pattern: who found it.
        write: the node that writes into a buffer; None for other forms.
        start: where it writes: an index tensor, or the first place (a number or its node).
        path: the buffer's place in a stack of buffers.
        inner: nodes between the past and `node` that are gone with it.
    """

    node: fx.Node
    new: fx.Node
    past: fx.Node | None
    axis: int | None
    form: CacheForm
    pattern: str
    write: fx.Node | None = None
    start: Any = None
    path: tuple[int, ...] = ()
    inner: tuple[fx.Node, ...] = ()

    @property
    def renews(self) -> bool:
        """The host goes on with a tensor of the graph's own, not with the buffer that it gave."""
        return self.write is not None and self.past is not None and not self.path and not changes(self.write)


@dataclass(frozen=True)
class Reader:
    """One of several attentions over the same queries and keys: for each block of its output, the cached value head
    that each query head reads.
    """

    core: Core
    blocks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Mixed:
    """Query heads that read keys of one cached head and values of others: all heads share one set of slots.

    Attributes:
        heads: cached heads; `keys` is the one whose keys each query head reads.
        widths: entries of a cached key and of a cached value.
    """

    heads: int
    keys: tuple[int, ...]
    widths: tuple[int, int]
    readers: tuple[Reader, ...]


@dataclass(frozen=True)
class Half:
    """One of the two cached tensors of a site.

    Attributes:
        update: its update.
        layout: the axis order it is cached in.
        chain: the views down to the core, the highest first.
        places: of it among the graph's outputs.
        parts: views of the chain that take the written part of a buffer, each with its axis of tokens; None for one
            that only leaves out other rows.
        end: how many tokens of a buffer are read, where only a call can tell whether the new ones are the last of them.
    """

    update: Update
    layout: Layout
    chain: tuple[fx.Node, ...]
    places: tuple[int, ...]
    end: End | None = None
    parts: tuple[tuple[fx.Node, int | None], ...] = ()


@dataclass(frozen=True)
class End:
    """How many tokens of a buffer an attention reads.

    Attributes:
        size: an int or a SymInt.
        masked: a mask spans what is read, so that it may be more than is written.
    """

    size: Any
    masked: bool


@dataclass(frozen=True)
class Site:
    """One attention core joined with the updates of its K and V.

    Attributes:
        name: module path of the core, or `site3`.
        layer: running number of the core among all cores with a cache in its graph.
        phase: prefill, extend or decode.
        dims: sizes by letter, `B Hq Hkv S D Dv`; ints or SymInts.
        source: the user's line that calls the attention.
        mixed: set if heads of keys and values do not belong together; then `Hkv` is 1, `core` the first reader.
        seen: what was proved of the mask; parts of it that were not stay tensors.
    """

    name: str
    layer: int
    phase: Phase
    core: Core
    key: Half
    value: Half
    dims: dict[str, Any]
    dtype: torch.dtype
    source: str
    mixed: Mixed | None
    seen: Visibility

    @property
    def cores(self) -> tuple[Core, ...]:
        """All attentions over this cache."""
        return tuple(reader.core for reader in self.mixed.readers) if self.mixed is not None else (self.core,)

    @property
    def nodes(self) -> set[fx.Node]:
        """What a rewrite takes out of the captured graph: core, views and updates, not the operands."""
        halves = {n for half in (self.key, self.value) for n in (half.update.node, *half.chain)}
        halves |= {half.update.write for half in (self.key, self.value) if half.update.write is not None}
        halves |= {n for half in (self.key, self.value) for n in half.update.inner}
        halves |= {operand(n) for n in set(halves) if call_name(n) == "copy_"}
        for update in (self.key.update, self.value.update):
            for node in taken_out(update.past, update.path) if update.past is not None else ():
                while node is not update.past:
                    halves.add(node)
                    node = operand(node)
        core = {node for one in self.cores for node in (one.node, *one.inner)}
        sizes = {reader for node in core for reader in unused_sizes(node, core)}
        return halves | core | sizes

    @property
    def group(self) -> int:
        return int(self.dims["Hq"]) // int(self.dims["Hkv"])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and tables."""
        return {
            "site": self.name,
            "layer": self.layer,
            "phase": self.phase.value,
            "core": f"{self.core.pattern}: {self.core.node.name}",
            "update": self.key.update.form.value,
            "layout": self.key.layout.value,
            "dims": {letter: str(size) for letter, size in self.dims.items()},
            "dtype": str(self.dtype).removeprefix("torch."),
            "mask": self.core.mask.name if self.core.mask is not None else "causal" if self.core.causal else "none",
            "sees": str(self.seen),
            "scale": self.core.scale,
            "source": self.source,
        }
