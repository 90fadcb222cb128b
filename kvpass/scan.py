"""patterns x graph -> SiteTable: find cores and updates, join them, or say why not. Edits nothing."""

from __future__ import annotations

from typing import Any

from torch import fx

from kvpass.errors import Reason
from kvpass.match.calls import call_name, example, module_path, source_line
from kvpass.match.dataflow import Flow
from kvpass.match.miss import Miss
from kvpass.match.shapes import is_one, same, shape_of
from kvpass.match.views import read_layout, walk_up
from kvpass.site import Core, Decline, Half, Site, SiteTable, Update
from kvpass.terms import CacheForm, Phase

BUFFER_WRITES = frozenset(
    {"index_copy_", "index_copy", "index_put_", "index_put", "setitem", "scatter_", "scatter", "slice_scatter", "copy_"}
)
ATTENTION_PARTS = frozenset({"softmax", "_softmax", "flex_attention", "sdpa"})
PROJECTIONS = frozenset({"linear", "matmul", "addmm", "mm", "bmm", "einsum"})


def scan(gm: fx.GraphModule, patterns: Any) -> SiteTable:
    """Find every attention with a KV cache in a traced graph.

    Args:
        gm: graph as Dynamo captured it (fake tensors in `meta["example_value"]`). Not modified.
        patterns: a `kvpass.patterns.PatternSet`.
    """
    flow = Flow(gm.graph)
    found = _Found(flow, patterns)
    sites: list[Site] = []
    declined = list(found.missed_cores)
    for core in found.cores:
        try:
            site = found.join(core, len(sites))
            if site is not None:
                sites.append(site)
        except Miss as miss:
            declined.append(_decline(core.node, miss))
    declined += found.unclaimed(sites, declined)
    return SiteTable(tuple(sites), tuple(declined))


class _Found:
    """Cores and updates of one graph, and the joining of the two."""

    def __init__(self, flow: Flow, patterns: Any) -> None:
        self.flow, self.patterns = flow, patterns
        self.cores: list[Core] = []
        self.missed_cores: list[Decline] = []
        self.updates: dict[fx.Node, Update] = {}
        self.missed_updates: dict[fx.Node, Miss] = {}
        for node in flow.nodes:
            self._try_cores(node)
            self._try_updates(node)
        self.readers: dict[fx.Node, int] = {}
        for core in self.cores:
            for operand in {self._walk(core.k)[0], self._walk(core.v)[0]}:
                self.readers[operand] = self.readers.get(operand, 0) + 1

    def _try_cores(self, node: fx.Node) -> None:
        for pattern in self.patterns.cores:
            try:
                core = pattern.match(node)
            except Miss as miss:
                if self._touches_cache(node):
                    self.missed_cores.append(_decline(node, miss))
                continue
            if core is not None:
                self.cores.append(core)
                return

    def _try_updates(self, node: fx.Node) -> None:
        for pattern in self.patterns.updates:
            try:
                update = pattern.match(node, self.flow)
            except Miss as miss:
                self.missed_updates[node] = miss
                return
            if update is not None:
                self.updates[node] = update
                return

    def _touches_cache(self, node: fx.Node) -> bool:
        """Does a refused core read a cache at all? If not it is no site."""
        operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
        return any(
            self._walk(arg)[0] in self.updates or self._walk(arg)[0] in self.flow.outputs for arg in operands[1:3]
        )

    def _walk(self, node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
        return walk_up(node, lambda n: n in self.updates or n in self.missed_updates or n in self.flow.outputs)

    def join(self, core: Core, layer: int) -> Site | None:
        """The site of a core; None if its K and V are no cache.

        Raises:
            Miss: they are a cache, but one of the rules of a site is broken.
        """
        base_k, chain_k = self._walk(core.k)
        base_v, chain_v = self._walk(core.v)
        updates = self._update_of(base_k), self._update_of(base_v)
        if updates == (None, None):
            return None
        if None in updates or updates[0].form != updates[1].form:  # type: ignore[union-attr]
            raise Miss(Reason.KEY_VALUE_MISMATCH, core.node, f"keys: {_form(updates[0])}, values: {_form(updates[1])}")
        key = self._half(core, updates[0], chain_k, Reason.KEY_ESCAPES)  # type: ignore[arg-type]
        value = self._half(core, updates[1], chain_v, Reason.VALUE_ESCAPES)  # type: ignore[arg-type]
        site = _site(core, key, value, layer)
        self._check(site)
        return site

    def _update_of(self, base: fx.Node) -> Update | None:
        if base in self.missed_updates:
            raise self.missed_updates[base]
        if base in self.updates:
            return self.updates[base]
        if call_name(base) in BUFFER_WRITES:
            raise Miss(Reason.UNSUPPORTED_UPDATE, base, f"the cache is written by {call_name(base)}")
        writer = next((user for user in base.users if call_name(user) in BUFFER_WRITES and user.args[0] is base), None)
        if writer is not None:
            raise Miss(Reason.UNSUPPORTED_UPDATE, writer, f"the cache is written by {call_name(writer)}")
        returned: Update | None = self.patterns.returned.match(base, self.flow)
        return returned

    def _half(self, core: Core, update: Update, chain: tuple[fx.Node, ...], reason: Reason) -> Half:
        layout = read_layout(update.node, chain, shape_of(core.q)[1])
        if update.axis is not None and update.axis != layout.token_axis:
            raise Miss(Reason.CAT_AXIS, update.node, f"cat along axis {update.axis} of {layout.value}")
        if self.readers[update.node] > 1:
            raise Miss(Reason.SHARED_CACHE, update.node, f"{self.readers[update.node]} attentions read it")
        region = set(chain) if update.form is CacheForm.RETURNED else {update.node, *chain}
        escaped = self.flow.escapes(region, [core.node])
        if update.past is not None:
            escaped += self.flow.escapes([update.past], [update.node])
        if escaped:
            raise Miss(reason, escaped[0], f"{update.node.name} also feeds {escaped[0].name}")
        return Half(update, layout, chain, tuple(self.flow.outputs[update.node]))

    def _check(self, site: Site) -> None:
        core, dims = site.core, site.dims
        new_tokens = shape_of(site.key.update.new)[site.key.layout.token_axis]
        if not same(dims["S"], new_tokens):
            raise Miss(Reason.CROSS_ATTENTION, core.node, f"{dims['S']} queries but {new_tokens} new keys")
        if site.phase is Phase.PREFILL and self._foreign_keys(core.q, site.key.update.new):
            raise Miss(Reason.CROSS_ATTENTION, core.node, "queries and keys are projected from different inputs")
        if core.mask is not None and not 1 <= len(shape_of(core.mask)) <= 4:
            raise Miss(Reason.MASK_SHAPE, core.mask, f"mask of shape {shape_of(core.mask)}")
        if core.causal and site.phase is Phase.DECODE:
            raise Miss(Reason.CAUSAL_WITH_PAST, core.node, "is_causal=True with one query")
        for half in (site.key, site.value):
            if not self.flow.convex(self.flow.between(half.update.node, core.node)):
                raise Miss(Reason.KEY_ESCAPES, half.update.node, "a path leaves the attention and comes back")

    def _foreign_keys(self, q: fx.Node, k: fx.Node) -> bool:
        """True if q and k are projections of different inputs, looking back over two projections (MLA has two)."""
        ours, theirs = self._projected(q), self._projected(k)
        return bool(ours and theirs) and not ours & theirs

    def _projected(self, node: fx.Node, levels: int = 2) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for upper in _projection_inputs(node):
            found.add(upper)
            if levels > 1:
                found |= self._projected(upper, levels - 1)
        return found

    def unclaimed(self, sites: list[Site], declined: list[Decline]) -> list[Decline]:
        """Cache updates that no site took and no core was blamed for: attention in a form nobody knows, or none at
        all.
        """
        taken = {half.update.node for site in sites for half in (site.key, site.value)}
        taken |= {self._walk(operand)[0] for core in self.cores for operand in (core.k, core.v)}
        named = {decline.site for decline in declined}
        extra: dict[str, Decline] = {}
        for update in self.updates.values():
            if update.node in taken or _name(update.node) in named or len(shape_of(update.node)) < 3:
                continue
            blocker = self.flow.reaches(update.node, ATTENTION_PARTS)
            miss = (
                Miss(
                    Reason.UNSUPPORTED_ATTENTION,
                    blocker,
                    f"{update.node.name} feeds {call_name(blocker)}, which is no known attention",
                )
                if blocker is not None
                else Miss(Reason.NO_ATTENTION, update.node, "nothing in this graph attends over it")
            )
            extra.setdefault(_name(update.node), _decline(update.node, miss))
        return list(extra.values())


def _projection_inputs(node: fx.Node) -> list[fx.Node]:
    """Data inputs of the nearest projections above a node."""
    found: list[Any] = []
    queue, seen = [node], {node}
    while queue:
        current = queue.pop()
        if call_name(current) in PROJECTIONS and current is not node:
            found.append(current.args[1 if call_name(current) == "addmm" else 0])
            continue
        fresh = [n for n in current.all_input_nodes if n not in seen and example(n) is not None]
        seen.update(fresh)
        queue += fresh
    return found


def _site(core: Core, key: Half, value: Half, layer: int) -> Site:
    q, k, v = shape_of(core.q), shape_of(key.update.new), shape_of(value.update.new)
    with_past = Phase.DECODE if is_one(q[2]) else Phase.EXTEND
    phase = Phase.PREFILL if key.update.past is None else with_past
    dims = {"B": q[0], "Hq": q[1], "Hkv": k[key.layout.head_axis], "S": q[2], "D": q[3], "Dv": v[3]}
    return Site(
        _name(core.node) or f"site{layer}",
        layer,
        phase,
        core,
        key,
        value,
        dims,
        example(core.q).dtype,
        source_line(core.node),
    )


def _form(update: Update | None) -> str:
    return update.form.value if update is not None else "not cached"


def _name(node: fx.Node) -> str:
    return module_path(node)


def _decline(node: fx.Node, miss: Miss) -> Decline:
    return Decline(
        _name(node) or node.name, miss.reason, miss.node.name, source_line(miss.node) or source_line(node), miss.detail
    )
