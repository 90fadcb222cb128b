"""What a cache holds and why: `report`, `inspect` and `explain`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from kvpass.errors import CacheError
from kvpass.kernels.ragged import even
from kvpass.runtime.shell import attached, find
from kvpass.runtime.store import SlotStore

DEEPEST = 8
"""Steps from a cache to its tensors: attributes, entries."""

NO_CACHES = {*vars(torch.nn.Module()), "kvpass"}
"""Attributes of a module that hold weights, hooks, and the records of compiled graphs."""


def stores(cache: Any) -> list[SlotStore]:
    """Every store that rides in a cache object: HF caches, nested tuples, lists and dicts, or modules with cache
    attributes.
    """
    found: dict[int, SlotStore] = {}
    for tensor in _tensors(cache):
        for store in (find(tensor), *attached(tensor)):
            if store is not None:
                found.setdefault(id(store), store)
    return sorted(found.values(), key=lambda s: s.layer)


def _tensors(cache: Any) -> Iterator[torch.Tensor]:
    """Tensors in an object, nearest first; modules in modules are one step, however deep they lie."""
    seen: set[int] = set()
    level, depth = [cache], 0
    while level and depth <= DEEPEST:
        parts: list[Any] = []
        for value in level:
            if id(value) in seen or isinstance(value, (str, bytes, int, float, type, type(None))):
                continue
            seen.add(id(value))
            if isinstance(value, torch.Tensor):
                yield value
            else:
                parts += _parts(value)
        level, depth = parts, depth + 1


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set)):
        return list(value)
    if isinstance(value, torch.nn.Module):
        own = [part for module in value.modules() for name, part in vars(module).items() if name not in NO_CACHES]
        return [*value.buffers(), *own]
    return list(getattr(value, "__dict__", {}).values())


@dataclass(frozen=True)
class Report:
    """What a cache holds. `str()` is a table, `to_dict()` plain data."""

    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Keys: policy, budget, tokens, bytes and dense_bytes (of K and V), overhead_bytes, sites, declined, and
        caller_bytes: of full-length buffers that the caller allocated, and that only the caller can free.
        """
        return self.data

    def __str__(self) -> str:
        d = self.data
        share = d["bytes"] / d["dense_bytes"] if d["dense_bytes"] else 0.0
        held = f"{_size(d['bytes'])} of {_size(d['dense_bytes'])} dense KV ({share:.1%})"
        extra = f"plus {_size(d['overhead_bytes'])} of positions and statistics, after {d['tokens']} tokens"
        head = f"  {'layer':>5} {'site':40} {'slots':>7} {'live':>11} {'KV':>10} {'dense':>10}"
        lines = [f"policy {d['policy']}, budget {d['budget']}: {held}, {extra}"]
        if d["caller_bytes"]:
            lines.append(f"  {_size(d['caller_bytes'])} more in full-length buffers that only the caller can free")
        lines.append(head)
        lines += [_row_text(s) for s in d["sites"]]
        for x in d["declined"]:
            lines.append(f"  dense {x['site']}: {x['reason']} at {x['node']} ({x['source']}); {x['hint']}")
        return "\n".join(lines)


def report(cache: Any) -> Report:
    """Bytes, slots and declined sites of a cache that a kvpass-compiled model returned.

    Args:
        cache: `out.cache` (`out.past_key_values` before transformers 5.24), a tuple cache, or a module that holds its
            cache in attributes.

    Raises:
        CacheError: no compressed cache in it.
    """
    found = _some(cache)
    sites = [_site_row(store) for store in found]
    origin = found[0].origin
    total = {key: sum(row[key] for row in sites) for key in ("bytes", "dense_bytes", "overhead_bytes")}
    declined = list({d["site"]: d for store in found for d in store.origin.declined}.values())
    tokens = max(store.tokens for store in found)
    return Report(
        {
            "policy": origin.policy,
            "budget": origin.budget,
            "tokens": tokens,
            **total,
            "caller_bytes": _caller_bytes(cache),
            "sites": sites,
            "declined": declined,
        }
    )


def _caller_bytes(cache: Any) -> int:
    """Bytes of buffers that stand for stores. A shell stands for one too, over a storage of one element."""
    sizes = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in _tensors(cache)
        if attached(t) and t.untyped_storage().nbytes() > t.element_size()
    }
    return sum(sizes.values())


def _some(cache: Any) -> list[SlotStore]:
    found = stores(cache)
    if not found:
        raise CacheError(
            f"no compressed cache in this {type(cache).__name__}",
            hint="pass the cache that a kvpass-compiled model returned (generate with return_dict_in_generate=True)",
        )
    return found


def _site_row(store: SlotStore) -> dict[str, Any]:
    live = store.live()
    return {
        "site": store.name,
        "layer": store.layer,
        "slots": store.slots,
        "live_min": int(live.min()),
        "live_max": int(live.max()),
        "bytes": store.bytes,
        "dense_bytes": store.dense_bytes,
        "overhead_bytes": store.overhead_bytes,
    }


def _row_text(s: dict[str, Any]) -> str:
    live = f"{s['live_min']}..{s['live_max']}" if s["live_min"] != s["live_max"] else str(s["live_max"])
    sizes = f"{_size(s['bytes']):>10} {_size(s['dense_bytes']):>10}"
    return f"  {s['layer']:>5} {s['site']:40} {s['slots']:>7} {live:>11} {sizes}"


@dataclass(frozen=True)
class LayerView:
    """Live slots of one site. `C` here is the largest live count; shorter heads are filled up.

    Attributes:
        positions: `[B, Hkv, C]` int64, ascending, -1 = empty (at the end).
        scores: `[B, Hkv, C]` float32, higher = keep, before protection; NaN where empty.
        keys, values: `[B, Hkv, C, D]`, zero where empty.
        bytes: bytes of allocated K and V slots.
    """

    name: str
    positions: torch.Tensor
    scores: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """Copies of the live slots of a cache, by layer."""

    layers: list[LayerView] = field(default_factory=list)


def inspect(cache: Any) -> Inspection:
    """Look into a compressed cache: positions, scores, keys and values of the live slots (copies).

    Raises:
        CacheError: no compressed cache in it.
    """
    return Inspection([_layer_view(store) for store in _some(cache)])


def _layer_view(store: SlotStore) -> LayerView:
    from kvpass.kernels.scores import slot_scores

    k, v, pos, stats = _as_host(store, *even(store.state)[:4])
    c = int(store.live().max())
    far = torch.iinfo(torch.int64).max
    order = torch.where(pos >= 0, pos.long(), far).argsort(dim=-1)[..., :c]
    positions = pos.gather(-1, order).long()
    empty = positions < 0
    scores = slot_scores(stats, pos, store.rule, store.tokens - 1).gather(-1, order).masked_fill(empty, float("nan"))
    keys, values = (
        t.gather(2, order[..., None].expand(-1, -1, -1, t.shape[-1])).masked_fill(empty[..., None], 0) for t in (k, v)
    )
    return LayerView(store.name, positions, scores, keys, values, store.bytes)


def _as_host(store: SlotStore, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """k, v, pos and stats in the heads of the host's cache."""
    k, v, pos, stats = state
    if store.host is None:
        return state
    (heads, dim), (_, wide) = store.host
    if v.shape[3] == 0:  # latent and rotated key in one slot
        return *k.split((dim, wide), dim=-1), pos, stats
    k, v = (t.squeeze(1).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (k, v))
    return k, v, pos.expand(-1, heads, -1), stats.expand(-1, -1, heads, -1)


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
