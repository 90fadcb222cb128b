"""Which positions each head of a cache holds, of compressed layers and of those left dense: what pages and spans count.

A layer that stays dense holds every position, or the last ones if it was declined as a sliding window. What else lies
beside the keys (states of recurrences, keys of another sequence) has no positions of this one: they are not known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from kvpass.api.holdings import Part, holdings
from kvpass.api.live_slots import compressed, positions_of
from kvpass.kernels.slots.cursor import FIRST
from kvpass.kernels.slots.moves import even
from kvpass.runtime.identity import Origin
from kvpass.runtime.store import SlotStore


@dataclass(frozen=True)
class Layer:
    """What a layer holds of each position, on the CPU.

    Attributes:
        name: of the site, or of the place in the cache.
        number: the first in that name; -1 where there is none.
        held: bool [B, Hkv, T]; None where a dense layer's positions are not known.
        whole: bool likewise: not as codes alone; None where nothing is held as codes.
        bytes: of keys and values.
        store: None of a dense layer.
        note: how a dense layer is, in words.
    """

    name: str
    number: int
    held: torch.Tensor | None
    whole: torch.Tensor | None
    bytes: int
    store: SlotStore | None = None
    note: str = ""


@dataclass(frozen=True)
class Retention:
    """What a cache holds of each position.

    Attributes:
        stores: the compressed layers'.
        first: columns in front of each row's first token, int64 [B].
        layers: in the model's order.
    """

    stores: list[SlotStore]
    first: torch.Tensor
    layers: list[Layer]

    @property
    def tokens(self) -> int:
        """Columns T: tokens seen, padding included."""
        return max(store.tokens for store in self.stores)

    @property
    def rows(self) -> int:
        """Sequences B."""
        return len(self.first)

    @cached_property
    def known(self) -> torch.Tensor:
        """Bool [B, heads of all layers whose positions are known, T]."""
        return torch.cat([layer.held for layer in self.layers if layer.held is not None], 1)


def retention(cache: Any) -> Retention:
    """Of a `cache` as for `report`.

    Raises:
        CacheError: no compressed cache in it.
    """
    stores = compressed(cache)
    tokens = max(store.tokens for store in stores)
    first = stores[0].state.cursor[:, 0, FIRST].long().cpu()
    first = torch.where(first < 0, tokens, first)
    layers = [_compressed(store, tokens) for store in stores]
    own = torch.arange(tokens) >= first[:, None, None]
    places: dict[str, list[Part]] = {}
    for part in holdings(cache).dense:
        places.setdefault(part.place, []).append(part)
    layers += [_dense(parts, stores[0].origin, tokens, own) for parts in places.values()]
    return Retention(stores, first, sorted(layers, key=lambda layer: layer.number))


def _compressed(store: SlotStore, tokens: int) -> Layer:
    from kvpass.kernels.codecs.storage import WHOLE_AT, coded  # all codecs with it: not when kvpass is imported

    held = flags(positions_of(store), tokens)
    halves, whole = coded(store.rule), None
    if halves:
        at = even(store.state)[WHOLE_AT].cpu()
        whole = flags(at.expand(-1, held.shape[1], -1), tokens) & held
    return Layer(store.name, _number(store.name), held, whole, store.bytes, store)


def flags(positions: torch.Tensor, tokens: int) -> torch.Tensor:
    """Bool [B, H, T] of positions int [B, H, n], -1 for none."""
    at = torch.where(positions < 0, tokens, positions.long())
    return torch.zeros(*at.shape[:2], tokens + 1, dtype=torch.bool).scatter_(-1, at, True)[..., :tokens]


def _dense(parts: list[Part], origin: Origin, tokens: int, own: torch.Tensor) -> Layer:
    """own: columns that are no padding in front of a row, bool [B, 1, T]."""
    place, size = parts[0].place, sum(part.bytes for part in parts)
    reasons = {d["reason"] for d in origin.declined if _number(d["site"]) == _number(place)}
    found = _heads_and_columns(parts, len(own), tokens)
    if found is None or "CROSS_ATTENTION" in reasons:
        return Layer(place, _number(place), None, None, size, note="left dense; it has no positions of this sequence")
    heads, columns = found
    if columns < tokens and "SLIDING_WINDOW" not in reasons:
        return Layer(place, _number(place), None, None, size, note=f"left dense, {columns} columns; which is not known")
    held = (own & (torch.arange(tokens) >= tokens - columns)).expand(-1, heads, -1)
    window = f"sliding window, the last {columns} columns" if columns < tokens else "all columns"
    return Layer(place, _number(place), held, None, size, note=f"left dense: {window}")


def _heads_and_columns(parts: list[Part], rows: int, tokens: int) -> tuple[int, int] | None:
    """Of keys and values side by side, [B, H, n, D] or [B, n, H, D]; None of anything else."""
    shapes = [tuple(part.tensor.shape) for part in parts]
    if len(shapes) != 2 or len(shapes[0]) != 4 or shapes[0][:3] != shapes[1][:3] or shapes[0][0] != rows:
        return None
    _, one, other, _ = shapes[0]
    return (other, one) if one == tokens != other else (one, other)


def _number(name: str) -> int:
    found = re.search(r"\d+", name)
    return int(found[0]) if found else -1
