"""One call at a time on what compiled models share: their modules.

A call puts the compiled model's own values of some attributes into the modules (`runtime/host_state.py`), looks what it
changed there, and may compile. Two calls of one model at once would take each other's values. What they compute anyway
runs one after the other on one device; generation in several threads takes turns at each token.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

_LOCKS: WeakKeyDictionary[torch.nn.Module, Any] = WeakKeyDictionary()
_LOCK = threading.Lock()


class Turns:
    """The right to call a model's modules; compiled models that share a module share it.

    Args:
        model: as it is when it is compiled. What is put into it later belongs to it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        modules = [*model.modules()]
        with _LOCK:
            known = {id(lock): lock for module in modules if (lock := _LOCKS.get(module)) is not None}
            own = next(iter(known.values()), None) or threading.RLock()
            for module in modules:
                _LOCKS.setdefault(module, own)
        self.locks = [known[key] for key in sorted(known)] or [own]

    def taken(self) -> AbstractContextManager[Any]:
        """For the time of a call: waits until no other thread is in one."""
        return self.locks[0] if len(self.locks) == 1 else self._all()

    @contextmanager
    def _all(self) -> Iterator[None]:
        """A model of models that were compiled by themselves: always in the same order."""
        with ExitStack() as stack:
            for lock in self.locks:
                stack.enter_context(lock)
            yield
