"""The live slots of a cache, copied out of it: `inspect`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kvpass.api.holdings import stores
from kvpass.errors import CacheError
from kvpass.kernels.slots.moves import even
from kvpass.runtime.store import SlotStore


@dataclass(frozen=True)
class LayerView:
    """Live slots of one site. `C` here is the largest live count; shorter heads are filled up.

    Attributes:
        name: of the site.
        positions: `[B, Hkv, C]` int64, ascending, -1 = empty (at the end).
        scores: `[B, Hkv, C]` float32, higher = keep, before protection; NaN where empty, and where they are means over
            heads of several ranks: looking asks nobody.
        keys, values: `[B, Hkv, C, D]` and `[B, Hkv, C, Dv]` in the cache's dtype, zero where empty.
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
    """Copies of the live slots of a cache.

    Attributes:
        layers: of each site, in the order of the model's layers.
    """

    layers: list[LayerView] = field(default_factory=list)


def inspect(cache: Any) -> Inspection:
    """Look into a compressed cache: positions, scores, keys and values of the live slots (copies) of a `cache` as
    for `report`.

    Raises:
        CacheError: no compressed cache in it.
    """
    return Inspection([layer_view(store) for store in compressed(cache)])


def layer_view(store: SlotStore) -> LayerView:
    from kvpass.kernels.codecs.entries import entries_of
    from kvpass.kernels.rank.criterion import Ranking
    from kvpass.kernels.rank.ranking import newest, slot_scores
    from kvpass.kernels.ranks import alone

    held = even(store.state)
    entries = entries_of(held, "k", store.rule), entries_of(held, "v", store.rule)
    k, v, pos, stats = _as_host(store, *entries, held.pos, held.stats)
    c = int(store.live().max())
    far = torch.iinfo(torch.int64).max
    order = torch.where(pos >= 0, pos.long(), far).argsort(dim=-1)[..., :c]
    positions = pos.gather(-1, order).long()
    empty = positions < 0
    rule = alone(store.rule)
    scores = slot_scores(stats, pos, rule, newest(store.state.cursor)).gather(-1, order)
    scores = scores.masked_fill(empty | (rule != store.rule and rule[Ranking].together), float("nan"))
    keys, values = (
        t.gather(2, order[..., None].expand(-1, -1, -1, t.shape[-1])).masked_fill(empty[..., None], 0) for t in (k, v)
    )
    return LayerView(store.name, positions, scores, keys, values, store.bytes)


def positions_of(store: SlotStore) -> torch.Tensor:
    """Positions of a store's slots in the heads of its host's cache: int32 `[B, Hkv, C]` on the CPU, -1 = empty."""
    pos = even(store.state).pos.cpu()
    if store.host is None or store.state.v.shape[3] == 0:
        return pos
    return pos.expand(-1, store.host[0][0], -1)


def _as_host(
    store: SlotStore, k: torch.Tensor, v: torch.Tensor, pos: torch.Tensor, stats: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """k, v, pos and stats in the heads of the host's cache."""
    if store.host is None:
        return k, v, pos, stats
    (heads, dim), (_, wide) = store.host
    if v.shape[3] == 0:  # latent and rotated key in one slot
        return *k.split((dim, wide), dim=-1), pos, stats
    k, v = (t.squeeze(1).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (k, v))
    return k, v, pos.expand(-1, heads, -1), stats.expand(-1, -1, heads, -1)


def compressed(cache: Any) -> list[SlotStore]:
    """The stores of a `cache` as for `report`, by layer; CacheError if there is none."""
    found = stores(cache)
    if not found:
        raise CacheError(
            f"no compressed cache in this {type(cache).__name__}",
            hint="pass the cache that a kvpass-compiled model returned (generate with return_dict_in_generate=True)",
        )
    return found
