"""A compiled graph in which nothing is rewritten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvpass.runtime.active import current
from kvpass.runtime.identity import Origin
from kvpass.runtime.left import Left
from kvpass.runtime.memory import storage_key
from kvpass.runtime.shell import refuse


class Untouched:
    """A compiled graph without a rewritten site, which must not be given shells to read.

    left: what to say of the caches in it, if it has any.
    written: results that are buffers with new tokens in them, how many, and the model's line: for graphs of the same
    call that attend to them.
    """

    def __init__(
        self,
        inner: Callable[..., Any],
        watched: Sequence[int],
        dense: Sequence[int] = (),
        left: Origin | None = None,
        written: Sequence[tuple[int, int, str]] = (),
    ) -> None:
        self.inner, self.watched, self.dense, self.written = inner, tuple(watched), tuple(dense), tuple(written)
        self.left = Left(left) if left is not None else None

    def __call__(self, *args: Any) -> Any:
        refuse(args, self.watched, "")
        result = self.inner(*args) if self.left is None else self.left.run(self.inner, args)
        call = current()
        if call is not None:
            call.ran(dense=[result[at] for at in self.dense])
            call.parted += [(storage_key(result[at]), tokens, line) for at, tokens, line in self.written]
        return result
