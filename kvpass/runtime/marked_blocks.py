"""Which block of `kvpass.marked` a call belongs to: that of its context, or of the thread that started its own.

A context variable carries marks through one thread and through tasks of asyncio. Python before 3.14 starts threads with
an empty context, and `Thread(target=model.generate, ..)` is how text is streamed; so while a block is open, what starts
a thread also notes the starter's block. Marks that no call got are said at the end of the block.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, WeakSet

import torch

from kvpass.errors import CacheError

Threads = WeakSet[threading.Thread]

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
_LOCK = threading.Lock()
_start: Callable[[threading.Thread], None] | None = None
"""`Thread.start` as it was, while `_noted_start` stands in its place."""


@contextmanager
def entered(block: Block) -> Iterator[None]:
    """Run a `with` body under the block.

    Raises:
        CacheError: at its end, if calls were made in threads that it did not reach, and none under it.
    """
    token = _CURRENT.set(block)
    _opened(block)
    try:
        yield
    finally:
        _closed(block)
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


def _opened(block: Block) -> None:
    """Join the open blocks; the first of them lets `Thread.start` note who starts whom, which Python does not."""
    global _start
    with _LOCK:
        _OPEN.append(block)
        if _start is None:
            _start = threading.Thread.start
            threading.Thread.start = _noted_start  # type: ignore[method-assign,assignment]  # put back by `_closed`


def _closed(block: Block) -> None:
    """Leave the open blocks; with the last, `Thread.start` is put back, unless somebody has wrapped it since."""
    global _start
    with _LOCK:
        block.closed = True
        _OPEN.remove(block)
        if not _OPEN and _start is not None and threading.Thread.start is _noted_start:
            threading.Thread.start = _start  # type: ignore[method-assign,assignment]  # as it was before `_opened`
            _start = None


def _noted_start(child: threading.Thread) -> None:
    block, start = _CURRENT.get() or _INHERITED.get(threading.current_thread()), _start
    if block is not None:
        block.heirs.add(child)
        _INHERITED[child] = block
    (start or threading.Thread.start)(child)
