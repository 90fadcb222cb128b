"""Functions of torch that are wrapped while somebody wants it: counted, restored, and left alone where they are not."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

_LOCK = threading.Lock()


class Patch:
    """One function, by module and dotted name; a torch that has none by that name stays as it is. Wrapped inside of a
    `with` block of it.

    wrap: makes the wrapper of the original, which gives what that gives wherever nothing of kvpass is compiled.
    """

    def __init__(self, module: str, name: str, wrap: Callable[[Any], Any]) -> None:
        self.module, self.path, self.wrap = module, name.split("."), wrap
        self.wanted = 0
        self.holder: Any = None
        self.original: Any = None
        self.wrapper: Any = None

    def begin(self) -> None:
        with _LOCK:
            self.wanted += 1
            if self.wanted == 1:
                self._put()

    def end(self) -> None:
        with _LOCK:
            self.wanted -= 1
            if not self.wanted and self.holder is not None:
                if getattr(self.holder, self.path[-1]) is self.wrapper:  # else somebody has wrapped it in turn
                    setattr(self.holder, self.path[-1], self.original)
                self.holder = None

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *error: object) -> None:
        self.end()

    def _put(self) -> None:
        try:
            holder: Any = importlib.import_module(self.module)
            for part in self.path[:-1]:
                holder = getattr(holder, part)
            original = getattr(holder, self.path[-1])
        except (ImportError, AttributeError):
            return
        if original is not self.original:
            self.original, self.wrapper = original, self.wrap(original)
        self.holder = holder
        setattr(holder, self.path[-1], self.wrapper)
