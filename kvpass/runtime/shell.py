"""Shells: tensors of the cache's logical shape over one NaN element, which carry the store in the host's own cache
object.

The host sees lengths (it derives positions and masks from them) but no data. The store rides on the tensor as an
attribute, so it lives, is
deep-copied and dies with the host's cache. A view of a shell loses the attribute and is found again by its storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvpass.errors import ForeignCacheError, ShellDataError, StaleCacheError
from kvpass.runtime.store import SlotStore, sharing_storage
from kvpass.terms import Layout

_ATTRIBUTE = "_kvpass_store"
_OWNED = "_kvpass_stores"
"""Stores that stand for a buffer which the caller owns, by their place in it."""


def make(store: SlotStore, half: int) -> torch.Tensor:
    """The shell of a store's keys (half 0) or values (half 1), `[B, Hkv, T, D]` in the host's axis order."""
    base = store.bases[half]
    shell = base.expand(_sizes(store, half, store.layouts[half]))
    setattr(shell, _ATTRIBUTE, store)
    return shell


def find(tensor: Any) -> SlotStore | None:
    """The store of a shell or of a view of one; None for any other tensor."""
    if not isinstance(tensor, torch.Tensor):
        return None
    store = getattr(tensor, _ATTRIBUTE, None)
    if store is None:
        store = next(iter(getattr(tensor, _OWNED, {}).values()), None)
    return store if store is not None else sharing_storage(tensor)


def attach(buffer: torch.Tensor, path: tuple[int, ...], store: SlotStore) -> None:
    """Let a store stand for a buffer, or for one of several stacked in it, that the caller owns."""
    if not hasattr(buffer, _OWNED):
        setattr(buffer, _OWNED, {})
    getattr(buffer, _OWNED)[path] = store


def attached(buffer: torch.Tensor) -> dict[tuple[int, ...], SlotStore]:
    """The stores that stand for a buffer, by their place in it."""
    return dict(getattr(buffer, _OWNED, {}))


def of_buffer(buffer: torch.Tensor, path: tuple[int, ...], position: int, where: str) -> SlotStore:
    """The store that a call continues by writing at `position` of a buffer.

    Raises:
        ForeignCacheError: the buffer holds tokens that kvpass did not see.
        StaleCacheError: the write does not continue what the store has seen.
    """
    store = getattr(buffer, _ATTRIBUTE, None) or attached(buffer).get(path)
    if store is None:
        raise _foreign(buffer, where)
    if store.tokens != position:
        raise StaleCacheError(
            f"new tokens are written at {position}, but the cache has seen {store.tokens}",
            where=where,
            hint="evicted tokens cannot come back: go on where the last call ended, or begin again at 0",
        )
    return store


def unwrap(past: tuple[torch.Tensor, torch.Tensor], layouts: tuple[Layout, Layout], where: str) -> SlotStore:
    """The store behind the K and V of a past, checked.

    Raises:
        ForeignCacheError: real keys that kvpass did not make.
        ShellDataError: data copied out of a shell.
        StaleCacheError: the cache was cropped, or advanced by another branch; or sequences were picked from it.
    """
    key, store = past[0], find(past[0])
    if store is None or find(past[1]) is not store:
        raise _foreign(key if store is None else past[1], where)
    length = key.shape[layouts[0].token_axis]
    if length != store.tokens:
        hint = "evicted tokens cannot come back: crop before compiling, or keep a copy.deepcopy(cache) from before"
        if length > store.tokens or hasattr(key, _ATTRIBUTE):
            hint = "continue from the newest cache, or branch with copy.deepcopy(cache) before generating"
        raise StaleCacheError(
            f"the cache is {length} tokens long, but its state has seen {store.tokens}", where=where, hint=hint
        )
    for half, layout in enumerate(layouts):
        if tuple(past[half].shape) != tuple(_sizes(store, half, layout)):
            raise StaleCacheError(
                f"the cache is {list(past[half].shape)}, but its state is of {_sizes(store, half, layout)}",
                where=where,
                hint="sequences cannot be picked out of a compressed cache; run each batch from its own prompt",
            )
    return store


def _sizes(store: SlotStore, half: int, layout: Layout) -> list[int]:
    """Logical shape of a store's keys or values in the host's axis order."""
    batch, heads, _, dim = store.state[half].shape
    dim = dim if store.widths is None else store.widths[half]
    sizes = {"B": batch, "H": heads, "T": store.tokens if store.length is None else store.length, "D": dim}
    return [sizes[letter] for letter in layout.value]


def _foreign(key: torch.Tensor, where: str) -> Exception:
    if key.is_floating_point() and key.numel() and bool(key[(0,) * key.dim()].isnan()):
        return ShellDataError(
            "the cached keys are NaN: data was read out of a compressed cache (reordered, indexed, joined or moved)",
            where=where,
            hint="pass the cache object as it was returned; copy it with copy.deepcopy. "
            "Beam search and batch reordering are not supported",
        )
    return ForeignCacheError(
        "the cache holds keys and values that kvpass did not make",
        where=where,
        hint="start from an empty cache: run the prompt through the compiled model too",
    )


def refuse(args: Sequence[Any], watched: Sequence[int], where: str) -> None:
    """Refuse shells where a graph reads its inputs as data: NaN must not flow on.

    Raises:
        ShellDataError: one of the watched inputs is a shell.
    """
    for at in watched:
        store = find(args[at])
        if store is not None:
            raise ShellDataError(
                f"a part of the model that kvpass left as it is reads the compressed cache of {store.name} as data",
                where=where or store.name,
                hint="compile with strict=True to see at once which attention was declined, and why",
            )
