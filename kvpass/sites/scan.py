"""patterns x graph -> SiteTable: find cores and updates, join them, or say why not. Edits nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from kvpass.errors import Reason
from kvpass.graph.attended import PARTS
from kvpass.graph.calls import argument, call_name
from kvpass.graph.dataflow import Flow
from kvpass.graph.equal import equal
from kvpass.graph.miss import Miss
from kvpass.graph.module_names import module_path
from kvpass.graph.nearby import home_of
from kvpass.graph.shapes import shape_of
from kvpass.graph.views import chain_scale, walk_pieces, walk_up
from kvpass.sites.halves import check_unchanged, half_of, is_tiled_core
from kvpass.sites.kept import is_kept, kept_otherwise, packed
from kvpass.sites.memory import MemoryMasks, check_memory
from kvpass.sites.mismatch import mismatch
from kvpass.sites.mixed import Mixing, find_mixing, join_mixed
from kvpass.sites.rules import check_site, make_site
from kvpass.sites.site import Core, Site, Update
from kvpass.sites.table import Decline, SiteTable
from kvpass.sites.unclaimed import changes_of, decline, unclaimed
from kvpass.sites.visible import Proofs
from kvpass.terms import CacheForm


def scan(gm: fx.GraphModule, patterns: Any, prove: bool = True) -> SiteTable:
    """Find every attention with a KV cache in a traced graph.

    Args:
        gm: graph as Dynamo captured it (fake tensors in `meta["example_value"]`). Not modified.
        patterns: a `kvpass.patterns.PatternSet`.
        prove: masks; else all of them stay tensors.
    """
    flow = Flow(gm.graph)
    found = _Found(flow, patterns)
    sites: list[Site] = []
    declined = list(found.missed_cores)
    groups = found.mixed()
    for core in found.cores:
        try:
            group = groups.get(core.node)
            if group is not None and group[0].core is not core:
                continue  # joined with the first of them
            site = found.join(core, len(sites)) if group is None else found.join_mixed(group, len(sites))
            if site is not None:
                sites.append(site)
        except Miss as miss:
            declined.append(decline(core.node, miss))
    declined += unclaimed(found, sites, declined)
    if prove:
        sites = [found.proofs.of(site) for site in sites]
    return SiteTable(tuple(sites), tuple(declined))


class _Found:
    """Cores and updates of one graph, and the joining of the two."""

    def __init__(self, flow: Flow, patterns: Any) -> None:
        self.flow, self.patterns, self.proofs = flow, patterns, Proofs()
        self.memories = MemoryMasks(self.proofs.elements)
        self.cores: list[Core] = []
        self.missed_cores: list[Decline] = []
        self.refused_cores: list[fx.Node] = []
        self.updates: dict[fx.Node, Update] = {}
        self.missed_updates: dict[fx.Node, Miss] = {}
        self.stacked: dict[tuple[fx.Node, tuple[int, ...]], fx.Node] = {}
        self.blamed: set[fx.Node] = set()
        for node in flow.nodes:
            self._try_cores(node)
            self._try_updates(node)
        self.readers: dict[fx.Node, int] = {}
        for core in self.cores:
            bases = (self._walk(node)[0] for node in core.cached)
            for base in {self.updates[base].node if base in self.updates else base for base in bases}:
                self.readers[base] = self.readers.get(base, 0) + 1

    def _try_cores(self, node: fx.Node) -> None:
        for pattern in self.patterns.cores:
            try:
                core = pattern.match(node)
            except Miss as miss:
                tokens = self._tokens(node)
                bases = self.operands(node, miss)
                caches = [base for base in bases if self._is_cache(base) or is_kept(self.flow, base, tokens)]
                if caches:
                    self.refused_cores.append(node)
                    self.missed_cores.append(decline(node, miss.by(pattern.name)))
                    self.blamed.update(caches)
                continue
            if core is not None:
                self.cores.append(self.patterns.refined(core))
                return

    def _try_updates(self, node: fx.Node) -> None:
        for pattern in self.patterns.updates:
            try:
                update = pattern.match(node, self.flow)
            except Miss as miss:
                self.missed_updates[node] = self.missed_updates[miss.node] = miss.by(pattern.name)
                return
            if update is not None:
                self._take(update)
                return

    def _take(self, update: Update) -> None:
        """Known by the value that becomes the cache, and by what the write gives back. A buffer is written once."""
        if update.path and update.past is not None:
            self.stacked[update.past, update.path] = update.node
        for node in {update.node, update.write or update.node}:
            if node in self.updates:
                assert update.write is not None
                miss = Miss(Reason.UNSUPPORTED_UPDATE, update.write, f"{update.node.name} is written twice")
                self.missed_updates[node] = miss
            self.updates[node] = update

    def operands(self, core: fx.Node, miss: Miss | None = None) -> list[fx.Node]:
        """What the keys and values of a refused core are views of."""
        found: Sequence[Any] = miss.reads if miss is not None else ()
        if not found and call_name(core) in PARTS:
            found = argument(core, 1, "key"), argument(core, 2, "value")
        return [self._walk(arg)[0] for arg in found if isinstance(arg, fx.Node)]

    def _tokens(self, core: fx.Node) -> Any:
        """How many keys a refused core attends to; None if it has a form of its own."""
        if call_name(core) in PARTS:
            return next(iter(shape_of(argument(core, 1, "key"))[-2:]), None)
        return next(iter(shape_of(core)[-1:]), None) if call_name(core) == "softmax" else None

    def _is_cache(self, base: fx.Node) -> bool:
        try:
            return self._update_of(base) is not None
        except Miss:
            return True

    def _walk(self, node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
        """What an operand is a view of; the written part of a buffer counts as a view of it."""
        base, chain = walk_up(node, self._stops)
        base = self._same_buffer(base)
        if not self._stops(base):
            for fronts in (False, True):
                top, pieces = walk_pieces(node, self._stops_here, fronts)
                top = self._same_buffer(top)
                if self._stops(top) and (not fronts or self._is_buffer(top)):
                    return top, pieces
        return base, chain

    def _stops_here(self, node: fx.Node) -> bool:
        return self._stops(self._same_buffer(node))

    def _is_buffer(self, node: fx.Node) -> bool:
        return node in self.updates and self.updates[node].form is CacheForm.BUFFER

    def _same_buffer(self, node: fx.Node) -> fx.Node:
        """The node by which a buffer in a stack was written, if `node` takes the same one out of the stack."""
        home, path = home_of(node)
        return self.stacked.get((home, path), node) if path else node

    def _stops(self, node: fx.Node) -> bool:
        return node in self.updates or node in self.missed_updates or node in self.flow.outputs

    def join(self, core: Core, layer: int) -> Site | None:
        """The site of a core; None if its K and V are no cache.

        Raises:
            Miss: they are a cache, but one of the rules of a site is broken.
        """
        (base_k, above_k), (base_v, above_v) = map(self._walk, core.cached)
        chain_k, chain_v = above_k + core.joins(0), above_v + core.joins(1)
        of_k, of_v = self._updates_of(core, base_k, base_v)
        if of_k is None and of_v is None:
            return None
        if of_k is None or of_v is None or of_k.form != of_v.form:
            raise self._mismatch(core, of_k, of_v)
        if not equal(of_k.start, of_v.start, self.flow):
            what = f"keys are written at {of_k.start}, values at {of_v.start}"
            raise Miss(
                Reason.KEY_VALUE_MISMATCH, core.node, what, hint="write both at the same place: one index for both"
            )
        core = replace(core, tiled=is_tiled_core(core, (of_k, of_v), (chain_k, chain_v)))
        check_memory(core, (above_k, above_v), self.memories)
        lengths = [shape_of(u.node)[u.axis] for u in (of_k, of_v) if u.axis is not None]
        one: set[fx.Node] = {*chain_k, *chain_v} if of_k.node is of_v.node else set()
        if of_k.renews and of_v.renews and of_k.past is of_v.past:  # the same zeros, before the first token
            one |= {n for u in (of_k, of_v) for n in (u.node, *u.inner)}
        both = ((of_k, chain_k), (of_v, chain_v))
        try:
            key, value = (
                half_of(self.flow, core, at, update, chain, self.readers[update.node], one, lengths)
                for at, (update, chain) in enumerate(both)
            )
        except Miss as miss:
            parts = packed(self.flow, core.cached) if miss.reason is Reason.UNSUPPORTED_ATTENTION else None
            raise parts or miss from None
        if chain_scale(chain_v) != 1.0:
            raise Miss(Reason.UNSUPPORTED_ATTENTION, chain_v[-1], "the cached values are scaled")
        self._check_inner(core)
        name = module_path(core.node) or f"site{layer}"
        site = make_site(name, replace(core, scale=core.scale * chain_scale(chain_k)), key, value, layer)
        check_site(site)
        if of_k.node is of_v.node and key.layout == value.layout:
            raise Miss(Reason.KEY_VALUE_MISMATCH, base_k, "keys and values are one tensor")
        return site

    def mixed(self) -> dict[fx.Node, list[Mixing]]:
        """Cores that read heads of a cache in an order of their own, by their node, with all others of that cache."""
        groups: dict[tuple[fx.Node, fx.Node], list[Mixing]] = {}
        for core in self.cores:
            bases = [self._same_buffer(walk_up(node, self._stops)[0]) for node in (core.k, core.v)]
            if all(base in self.updates or base in self.missed_updates for base in bases):
                continue
            if self._walk(core.k)[0] is self._walk(core.v)[0]:
                continue  # keys and values in one tensor
            mixing = find_mixing(core, self.updates, self._stops)
            if mixing is not None:
                groups.setdefault((mixing.key.node, mixing.value.node), []).append(mixing)
        return {mixing.core.node: group for group in groups.values() for mixing in group}

    def join_mixed(self, group: list[Mixing], layer: int) -> Site:
        """The site of several cores over one cache. Raises Miss."""
        for mixing in group:
            self._check_inner(mixing.core)
            for update in (mixing.key, mixing.value):
                check_unchanged(self.flow, mixing.core, update)
        name = module_path(group[0].core.node) or f"site{layer}"
        return join_mixed(name, layer, group, self.flow)

    def _updates_of(self, core: Core, base_k: fx.Node, base_v: fx.Node) -> tuple[Update | None, Update | None]:
        """Of keys and values. Raises Miss, also where what is kept of both is no update."""
        bases = base_k, base_v
        try:
            found = self._update_of(base_k), self._update_of(base_v)
        except Miss as refused:
            miss: Miss | None = (None if refused.reason.by_choice else packed(self.flow, bases)) or refused
        else:
            miss = kept_otherwise(self.flow, core, bases) if found == (None, None) else None
        if miss is not None:
            self.blamed.update(miss.reads)
            raise miss
        return found

    def _mismatch(self, core: Core, key: Update | None, value: Update | None) -> Miss:
        bases = [self._walk(node)[0] for node in core.cached]
        caches = self.updates if key is None or value is None else ()
        between = (changes_of(self.flow, cache, bases) for cache in caches)
        miss = next((miss for miss in between if miss is not None), None)
        if miss is None:
            return mismatch(self.flow, core, bases, (key, value))
        self.blamed.update(cache for cache in self.updates if self.flow.between(cache, miss.node))
        return miss

    def _update_of(self, base: fx.Node) -> Update | None:
        if base in self.missed_updates:
            raise self.missed_updates[base]
        if base in self.updates:
            return self.updates[base]
        for pattern in self.patterns.refused:
            try:
                pattern.match(base, self.flow)
            except Miss as miss:
                raise miss.by(pattern.name) from None
        returned: Update | None = self.patterns.returned.match(base, self.flow)
        return returned

    def _check_inner(self, core: Core) -> None:
        escaped = self.flow.escapes(core.inner, [core.node])
        if escaped or any(node in self.flow.outputs for node in core.inner):
            where = escaped[0].name if escaped else "the output"
            raise Miss(Reason.UNSUPPORTED_ATTENTION, core.node, f"logits or probabilities also feed {where}")
