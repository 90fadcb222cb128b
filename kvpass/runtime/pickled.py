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
from kvpass.runtime.shell import make, of_shell
from kvpass.runtime.store import SlotStore, unpicklable

_PACKED: WeakKeyDictionary[SlotStore, Packed] = WeakKeyDictionary()


class Packed:
    """In the place of a store that is pickled; always the same one, so that keys and values get one store again."""

    def __init__(self, store: SlotStore) -> None:
        self.store = ref(store)

    def __reduce__(self) -> Any:
        store = self.store()
        assert store is not None, "its shell is being pickled"
        return _store, (facts_of(store), tensors_of(store), store.origin)


def reduced(shell: torch.Tensor) -> Any:
    """How pickle makes a shell again.

    Raises:
        StaleCacheError: it was cropped, another branch has gone on with it, or a call on it failed.
    """
    store, half = of_shell(shell, "a pickle")
    packed = _PACKED.get(store)
    if packed is None:
        packed = _PACKED[store] = Packed(store)
    return _shell, (packed, half)


def _store(facts: dict[str, Any], tensors: dict[str, torch.Tensor], origin: Any) -> SlotStore:
    try:
        with torch.inference_mode(False), torch.no_grad():
            return restored(facts, tensors, origin)
    except Unfit as error:
        raise CacheError(
            f"a pickled cache cannot be read: {error}", where="a pickle", hint="run the prompt through the model again"
        ) from error


def _shell(store: Any, half: int) -> torch.Tensor:
    from kvpass.runtime.veil import veil

    if not isinstance(store, SlotStore):  # copy.copy of a tensor asks how it is pickled, and makes it again at once
        raise unpicklable("a copy of one tensor of it")
    with torch.inference_mode(False):
        shell = make(store, half)
    veil([shell])
    return shell
