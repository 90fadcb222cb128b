"""Shells: tensors of the cache's logical shape over one NaN element, which carry the store in the host's own cache
object.

The host sees lengths (it derives positions and masks from them) but no data. The store rides on the tensor as an
attribute, so it lives, is
deep-copied and dies with the host's cache. A view of a shell loses the attribute and is found again by its storage.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch

from kvpass.errors import ForeignCacheError, ShellDataError, StaleCacheError
from kvpass.runtime.store import SlotStore
from kvpass.terms import Layout

_ATTRIBUTE = "_kvpass_store"
_BY_STORAGE: WeakValueDictionary[int, SlotStore] = WeakValueDictionary()


def make(store: SlotStore, half: int) -> torch.Tensor:
    """The shell of a store's keys (half 0) or values (half 1), `[B, Hkv, T, D]` in the host's axis order."""
    base, layout, t = store.bases[half], store.layouts[half], store.state[half]
    sizes = {"B": t.shape[0], "H": t.shape[1], "T": store.tokens, "D": t.shape[3]}
    shell = base.expand([sizes[letter] for letter in layout.value])
    setattr(shell, _ATTRIBUTE, store)
    _BY_STORAGE[_storage_key(base)] = store
    return shell


def find(tensor: Any) -> SlotStore | None:
    """The store of a shell or of a view of one; None for any other tensor."""
    if not isinstance(tensor, torch.Tensor):
        return None
    store = getattr(tensor, _ATTRIBUTE, None)
    return store if store is not None else _BY_STORAGE.get(_storage_key(tensor))


def unwrap(key: torch.Tensor, value: torch.Tensor, axis: Layout, where: str) -> SlotStore:
    """The store behind a past, checked.

    Raises:
        ForeignCacheError: real keys that kvpass did not make.
        ShellDataError: data copied out of a shell.
        StaleCacheError: the cache was cropped, or advanced by another branch.
    """
    store = find(key)
    if store is None or find(value) is not store:
        raise _foreign(key, where)
    length = key.shape[axis.token_axis]
    if length != store.tokens:
        hint = "evicted tokens cannot come back: crop before compiling, or keep a copy.deepcopy(cache) from before"
        if length > store.tokens or hasattr(key, _ATTRIBUTE):
            hint = "continue from the newest cache, or branch with copy.deepcopy(cache) before generating"
        raise StaleCacheError(
            f"the cache is {length} tokens long, but its state has seen {store.tokens}", where=where, hint=hint
        )
    return store


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


def _storage_key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
