"""Which stores a memory of the caller's stands for: known by storage, offset, sizes and strides, not by tensor object.

A host may take its buffers anew out of one stack at every call. What stands there hangs on the storage, which every
view shares, and dies with it; and on the tensors that were seen, as `copy.deepcopy` copies what hangs on tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch

if TYPE_CHECKING:
    from kvpass.runtime.store import SlotStore

_STANDING = "_kvpass_standing"

Stands = tuple["SlotStore", int]
"""A store, and whether for its keys (0) or its values (1)."""


class Place(NamedTuple):
    """A part of a memory, in elements of a dtype."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        """The first element behind it."""
        return self.offset + sum((n - 1) * step for n, step in zip(self.sizes, self.strides, strict=True)) + 1

    def overlaps(self, other: Place) -> bool:
        """Whether an element lies in both; where strides differ, whether one lies between the other's ends."""
        if 0 in (*self.sizes, *other.sizes):
            return False
        if self.dtype != other.dtype:  # counted in different elements
            return True
        if self.end <= other.offset or other.end <= self.offset:
            return False
        if self.strides != other.strides:
            return True
        axes = sorted(zip(self.strides, self.sizes, other.sizes, strict=True), reverse=True)
        return _meets(other.offset - self.offset, axes)


def storage_key(value: Any) -> int:
    """What tells one storage from another while a call runs; 0 of what is no tensor."""
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else 0


def _meets(distance: int, axes: Sequence[tuple[int, int, int]]) -> bool:
    """Is the distance a sum of steps, of each axis more than minus the other's size and less than the own one?"""
    if not axes:
        return distance == 0
    (step, own, others), rest = axes[0], axes[1:]
    if step == 0:
        return _meets(distance, rest)
    near = distance // step
    return any(-others < n < own and _meets(distance - n * step, rest) for n in (near, near + 1))


class Standing:
    """What a memory stands for.

    Attributes:
        home: its storage; None for a copy that has not been looked at.
    """

    def __init__(self, home: Any = None) -> None:
        self.home = ref(home) if home is not None else None
        self.places: dict[Place, Stands] = {}

    def __reduce__(self) -> Any:
        """Refuse to be pickled: another process has none of the caller's buffers.

        Raises:
            CacheError: always.
        """
        from kvpass.runtime.store import unpicklable

        raise unpicklable(next((store.name for store, _ in self.places.values()), ""))

    def __deepcopy__(self, memo: dict[int, Any]) -> Standing:
        """Of the copied memory, whichever that is; its stores are copies too."""
        from copy import deepcopy

        other = memo[id(self)] = Standing()
        other.places = {place: (deepcopy(store, memo), half) for place, (store, half) in self.places.items()}
        return other


def place_of(tensor: torch.Tensor, path: Sequence[int] = ()) -> Place:
    """The place of a tensor, or of one of those that are stacked in it."""
    offset, sizes, strides = int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()
    for axis, at in enumerate(path):
        offset += (at % sizes[axis]) * strides[axis]
    return Place(int(offset), sizes[len(path) :], strides[len(path) :], tensor.dtype)


def standing_of(tensor: torch.Tensor) -> Standing | None:
    """What the memory of a tensor stands for, if it stands for anything."""
    storage = tensor.untyped_storage()
    found: Standing | None = getattr(storage, _STANDING, None)
    if found is not None:
        return found
    for holder in (tensor, tensor._base):  # a copy's
        kept: Standing | None = getattr(holder, _STANDING, None)
        if kept is not None and (kept.home is None or kept.home() is storage):
            kept.home = ref(storage)
            setattr(storage, _STANDING, kept)
            return kept
    return None


def stands(tensor: torch.Tensor, path: Sequence[int] = ()) -> Stands | None:
    """What exactly this tensor, or one of those stacked in it, stands for."""
    found = standing_of(tensor)
    return None if found is None else found.places.get(place_of(tensor, path))


def overlapping(tensor: torch.Tensor, path: Sequence[int] = ()) -> list[Stands]:
    """What any part of a tensor stands for."""
    found = standing_of(tensor)
    if found is None:
        return []
    here = place_of(tensor, path)
    return [one for place, one in found.places.items() if place == here or place.overlaps(here)]


def stand(tensor: torch.Tensor, path: Sequence[int], store: SlotStore, half: int) -> None:
    """Let a tensor, or one of those stacked in it, stand for a store, and for nothing else any more."""
    storage = tensor.untyped_storage()
    found = standing_of(tensor)
    if found is None:
        found = Standing(storage)
        setattr(storage, _STANDING, found)
    here = place_of(tensor, path)
    if found.places.get(here, (None, 0))[0] is not store:
        for place in [one for one in found.places if one.overlaps(here)]:
            del found.places[place]
    found.places[here] = store, half
    for holder in (tensor, tensor._base):
        if holder is not None and getattr(holder, _STANDING, None) is not found:
            setattr(holder, _STANDING, found)
