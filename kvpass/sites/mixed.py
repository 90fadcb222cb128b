"""Sites of attentions whose query heads read keys of one cached head and values of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import example
from kvpass.graph.dataflow import Flow
from kvpass.graph.miss import Miss
from kvpass.graph.mixing import Heads, heads_read, mixed_from
from kvpass.graph.shapes import shape_of
from kvpass.sites.rules import check_site, make_site
from kvpass.sites.site import Core, Half, Mixed, Reader, Site, Update
from kvpass.terms import CacheForm, Layout

FORMS = (CacheForm.CONCAT, CacheForm.EMPTY)


@dataclass(frozen=True)
class Mixing:
    """How one core reads two caches."""

    core: Core
    key: Update
    value: Update
    keys: tuple[int, ...]
    blocks: Heads
    nodes: tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]


def find_mixing(core: Core, updates: dict[fx.Node, Update], stop: Callable[[fx.Node], bool]) -> Mixing | None:
    """How a core reads its caches, if it rearranges their heads; None if it computes anything, or changes places of
    tokens.
    """
    if core.latent is not None or core.memory is not None or core.axes.q != "BHSD" or core.axes.out != "BHSD":
        return None
    found = [mixed_from(node, stop) for node in (core.k, core.v)]
    halves = [(updates.get(part[0]), part[1]) for part in found if part is not None]
    if len(halves) != 2 or any(u is None or u.form not in FORMS or u.axis != 2 for u, _ in halves):
        return None
    (key, key_nodes), (value, value_nodes) = halves
    assert key is not None
    assert value is not None
    queries = shape_of(core.q)[1]
    keys = _for_queries(heads_read(key.node, key_nodes, core.k, core.axes.k), queries)
    blocks = _for_queries(heads_read(value.node, value_nodes, core.v, core.axes.v), queries)
    if keys is None or blocks is None or len(keys) != 1:
        return None
    return Mixing(core, key, value, keys[0], blocks, (tuple(key_nodes), tuple(value_nodes)))


def _for_queries(heads: Heads | None, queries: Any) -> Heads | None:
    """For each query head, where an attention shares one head of its keys or values among neighbours
    (`enable_gqa=True`).
    """
    if heads is None or not isinstance(queries, int) or queries % len(heads[0]):
        return None
    group = queries // len(heads[0])
    return tuple(tuple(head for head in block for _ in range(group)) for block in heads)


def join_mixed(name: str, layer: int, group: Sequence[Mixing], flow: Flow) -> Site:
    """The site of all cores that read the same two caches.

    Raises:
        Miss: SHARED_CACHE if they differ in more than the values; KEY_ESCAPES or VALUE_ESCAPES if others read them too.
    """
    first = group[0]
    for other in group[1:]:
        _check_alike(first, other)
    cores = [node for mixing in group for node in (mixing.core.node, *mixing.core.inner)]
    key, value = (
        _half(flow, (first.key, first.value)[at], [n for m in group for n in m.nodes[at]], cores, reason)
        for at, reason in enumerate((Reason.KEY_ESCAPES, Reason.VALUE_ESCAPES))
    )
    readers = tuple(Reader(mixing.core, mixing.blocks) for mixing in group)
    (_, heads, _, of_key), (*_, of_value) = shape_of(first.key.new), shape_of(first.value.new)
    mixed = Mixed(int(heads), first.keys, (int(of_key), int(of_value)), readers)
    site = make_site(name, first.core, key, value, layer, mixed)
    check_site(site)
    return site


def _check_alike(first: Mixing, other: Mixing) -> None:
    a, b = first.core, other.core
    ours = (a.q, a.terms, a.scale, a.causal, a.softcap, a.sinks, first.keys, first.key, first.value)
    theirs = (b.q, b.terms, b.scale, b.causal, b.softcap, b.sinks, other.keys, other.key, other.value)
    if ours != theirs:
        raise Miss(Reason.SHARED_CACHE, b.node, "two attentions read one cache and differ in more than the values")


def _half(flow: Flow, update: Update, nodes: Sequence[fx.Node], cores: Sequence[fx.Node], reason: Reason) -> Half:
    chain = sorted(set(nodes), key=flow.order.__getitem__)
    escaped = flow.escapes({update.node, *chain}, cores)
    if update.past is not None:
        escaped += flow.escapes([update.past], [update.node])
    if escaped:
        raise Miss(reason, escaped[0], f"{update.node.name} also feeds {escaped[0].name}")
    assert example(update.new) is not None
    return Half(update, Layout.BHTD, tuple(chain), tuple(flow.outputs[update.node]))
