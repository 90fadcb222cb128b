"""How many bytes caches of a compiled model will hold, before they are made: what admission to a fixed memory asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from kvpass.api.holdings import holdings
from kvpass.errors import CacheError
from kvpass.kernels.budget import kept, within
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rule import Rule
from kvpass.kernels.timing import Timing
from kvpass.runtime.room import spare_slots
from kvpass.runtime.store import LEAST_ROOM, SlotStore


@dataclass(frozen=True)
class LayerBounds:
    """What one layer holds by numbers of rows, slots and places.

    Attributes:
        fields: of each tensor of its state: the letters of its dims (`kvpass.kernels.slots.state.Field`), its sizes,
            and bytes of an entry.
        token: bytes of a token's keys and values in an unmodified cache.
        recorded: its steps are replayed, and its slots grow by more at a time.
    """

    rule: Rule
    fields: tuple[tuple[str, tuple[int, ...], int], ...]
    token: int
    recorded: bool

    @classmethod
    def of(cls, store: SlotStore) -> LayerBounds:
        state = store.state
        fields = [
            (f.dims, tuple(t.shape), t.element_size()) for f, t in zip(state.fields, state.tensors(), strict=True)
        ]
        token = sum(t.shape[1] * t.shape[3] * t.element_size() for t in (state.k, state.v))
        return cls(store.rule, tuple(fields), token, store.recorded)

    def during(self, calls: Sequence[int], rows: int) -> Iterator[int]:
        """Bytes in each of the calls of several tokens, its own keys and values beside the slots included."""
        seen = used = 0
        for new in calls:
            most = kept(self.rule, new) if not seen and not self.rule[ShareOut].share else used + new
            yield self._bytes(rows, most, seen + new) + rows * new * self.token
            used = self._used(used, seen, new)
            seen += new

    def held(self, calls: Sequence[int], steps: int, rows: int) -> int:
        """Bytes at most after the calls and while so many steps follow."""
        seen = used = 0
        for new in calls:
            used, seen = self._used(used, seen, new), seen + new
        timing, tokens = self.rule[Timing], seen + steps
        if self.rule[ShareOut].share:
            used = tokens
        elif self.rule.of_steps is self.rule:
            used = kept(self.rule, tokens)
        elif timing.when == "always":
            used = min(used + steps, kept(self.rule, tokens) + timing.every)
        else:
            used += steps
        return self._bytes(rows, used, tokens)

    def _used(self, used: int, seen: int, new: int) -> int:
        """Slots in use after a call of several tokens."""
        if self.rule[ShareOut].share:  # one layer may hold all that the others give up
            return seen + new
        acts = self.rule.of_call(seen) is self.rule
        return kept(self.rule, seen + new) if acts else used + new

    def _bytes(self, rows: int, used: int, tokens: int) -> int:
        sizes = {"B": rows, "C": used + self._spare(used)}
        if self.rule.demotes:
            whole = within(self.rule, tokens)
            sizes["W"] = whole + self._spare(whole)
        return sum(
            size * prod(sizes.get(letter, own) for letter, own in zip(dims, shape, strict=True))
            for dims, shape, size in self.fields
        )

    def _spare(self, used: int) -> int:
        return max(LEAST_ROOM if self.recorded else 1, spare_slots(used))


@dataclass(frozen=True)
class Bounds:
    """Upper bounds of the bytes of caches like one, positions and statistics included. No tensor is kept.

    What comes is told as `calls`, the numbers of tokens of calls of several of them (a prompt; its shared beginning
    and the rest), and `steps`, of tokens that come one by one behind those. Of a batch, give its longest row's: its
    memory is rectangular, so that each row holds as much. Where layers share out their slots, a bound is the dense one:
    one layer may hold what the others give up.
    """

    layers: tuple[LayerBounds, ...]

    def held(self, calls: Sequence[int], steps: int = 0, rows: int = 1) -> int:
        """Bytes between two calls, at any time from the last of `calls` on."""
        return sum(layer.held(calls, steps, rows) for layer in self.layers)

    def peak(self, calls: Sequence[int], steps: int = 0, rows: int = 1) -> int:
        """Bytes at any moment, inside of calls too: a call holds its own keys and values until they are evicted
        (counted here as if all layers did so at once), and a layer that grows is copied.
        """
        layers = [list(layer.during(calls, rows)) for layer in self.layers]
        whole = [sum(layer[at] for layer in layers) for at in range(len(calls))]
        return max([*whole, self.held(calls, steps, rows) + self.layer(calls, steps, rows)])

    def layer(self, calls: Sequence[int], steps: int = 0, rows: int = 1) -> int:
        """Bytes of the largest layer: what is held twice while it grows, or rows are stacked."""
        return max(layer.held(calls, steps, rows) for layer in self.layers)


def bounds(host: Any) -> Bounds:
    """The bounds of caches like this one.

    Raises:
        CacheError: it holds no token yet; or something lies beside the compressed layers, whose growth is not known.
    """
    found = holdings(host)
    if not found.stores:
        raise CacheError(
            "the cache holds no token yet: what its layers hold is not known",
            hint="run some prompt through the compiled model first",
        )
    if found.dense or found.buffers:
        part = (found.dense + found.buffers)[0]
        raise CacheError(
            f"a tensor of {list(part.tensor.shape)} lies beside the compressed slots: how it grows is not known",
            where=part.path.lstrip("."),
            hint="bounds are of caches that grow and whose layers are all compressed: no windows, no preallocated ones",
        )
    return Bounds(tuple(LayerBounds.of(store) for store in found.stores))
