"""Which block of `kvpass.marked` a call belongs to: that of its context, or of the thread that started its own.

A context variable carries marks through one thread and through tasks of asyncio. Python before 3.14 starts threads with
an empty context, and `Thread(target=model.generate, ..)` is how text is streamed; so an audit hook, which Python calls
where a thread is started, notes the starter's block. Marks that no call got are said at the end of the block.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from kvpass.errors import CacheError

Threads = WeakSet[threading.Thread]

_STARTS = frozenset({"_thread.start_new_thread", "_thread.start_joinable_thread"})
"""Audit events before a thread is started, until Python 3.12 and from 3.13 on: the first argument is what it runs."""

_IN_THREAD = "open kvpass.marked(..) inside of the function that the thread runs"


@dataclass(eq=False)
class Block:
    """One block of `kvpass.marked`.

    Attributes:
        marks: int32 [B, T]. words: the kinds that were given, of `keep`, `spans` and `drop`.
        read: whether a call was made under it.
        closed: whether it has ended.
        heirs: threads that were started under it; begun: those of them that have begun a cache under it.
        missed: names of threads that called without marks while nobody had read these.
    """

    marks: torch.Tensor
    words: tuple[str, ...]
    read: bool = False
    closed: bool = False
    heirs: Threads = field(default_factory=WeakSet)
    begun: Threads = field(default_factory=WeakSet)
    missed: list[str] = field(default_factory=list)


_CURRENT: ContextVar[Block | None] = ContextVar("kvpass_marks", default=None)
_INHERITED: WeakKeyDictionary[threading.Thread, Block] = WeakKeyDictionary()
_OPEN: list[Block] = []


@contextmanager
def entered(block: Block) -> Iterator[None]:
    """Run a `with` body under the block.

    Raises:
        CacheError: at its end, if calls were made in threads that it did not reach, and none under it.
    """
    _watch_threads()
    token = _CURRENT.set(block)
    _OPEN.append(block)
    try:
        yield
    finally:
        block.closed = True
        _OPEN.remove(block)
        _CURRENT.reset(token)
    if block.read or any(heir.is_alive() for heir in block.heirs):
        return
    if block.missed:
        what = f"no call got the marks: thread {block.missed[0]!r} called the model, which began before their block"
        raise CacheError(what, where="kvpass.marked", hint=_IN_THREAD)
    warnings.warn("kvpass.marked: no compiled model was called with a cache inside the block", stacklevel=5)


def of_this_call(position: int | None = None) -> Block | None:
    """The block that a call of a compiled model belongs to; None if nothing is marked.

    position: of the call's first token, for a call that reads marks.

    Raises:
        CacheError: a thread that was started inside a block begins another cache after its end.
    """
    block, thread = _CURRENT.get(), threading.current_thread()
    if block is None:
        block = _INHERITED.get(thread)
        if block is not None and block.closed and thread in block.begun:  # one of a pool, or a server
            if position is None:
                return None
            if position == 0:
                what = f"thread {thread.name!r} was started inside of a block of kvpass.marked, which has ended"
                raise CacheError(what, hint=f"start it outside of the block, and {_IN_THREAD}")
    if block is None:
        for other in _OPEN.copy():
            if not other.read and thread.name not in other.missed:
                other.missed.append(thread.name)
        return None
    block.read = True
    if position is not None:
        block.begun.add(thread)
    return block


@lru_cache(maxsize=1)
def _watch_threads() -> None:
    """From the first block on. Python keeps an audit hook for good: it does nothing for other events."""
    sys.addaudithook(_note_heir)


def _note_heir(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in _STARTS:
        return
    child = getattr(arguments[0], "__self__", None)
    block = _CURRENT.get() or _INHERITED.get(threading.current_thread())
    if block is not None and isinstance(child, threading.Thread):
        block.heirs.add(child)
        _INHERITED[child] = block
