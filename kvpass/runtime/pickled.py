"""Compressed caches in pickles, `torch.save` among them: a store as its facts and tensors, a shell as a half of it.

Which model it belongs to is told by content, and settled by the first compiled model that goes on with it. Where
nothing may run code of a file, `Cache.save` is the way.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, ref

import torch

from kvpass.errors import CacheError
from kvpass.runtime.saved import Unfit, facts_of, restored, tensors_of
from kvpass.runtime.shell import of_shell
from kvpass.runtime.store import SlotStore

_PACKED: WeakKeyDictionary[SlotStore, Packed] = WeakKeyDictionary()


class Packed:
    """In the place of a store that is pickled; always the same one, so that keys and values get one store again."""

    def __init__(self, store: SlotStore) -> None:
        self.store = ref(store)

    def __reduce__(self) -> Any:
        store = self.store()
        assert store is not None, "its shell is being pickled"
        return _store, (facts_of(store), tensors_of(store), store.origin)


def packed(shell: torch.Tensor) -> tuple[Packed, int]:
    """What a shell is made of again: its store, once for keys and values, and the half that it is of it.

    Raises:
        StaleCacheError: it was cropped, another branch has gone on with it, or a call on it failed.
    """
    store, half = of_shell(shell, "a pickle")
    found = _PACKED.get(store)
    if found is None:
        found = _PACKED[store] = Packed(store)
    return found, half


def _store(facts: dict[str, Any], tensors: dict[str, torch.Tensor], origin: Any) -> SlotStore:
    try:
        with torch.inference_mode(False), torch.no_grad():
            return restored(facts, tensors, origin)
    except Unfit as error:
        raise CacheError(
            f"a pickled cache cannot be read: {error}", where="a pickle", hint="run the prompt through the model again"
        ) from error
