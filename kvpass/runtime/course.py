"""How much a cache held after its calls: a short record of host integers, which reads nothing of a device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.state import State

MOST = 256
"""Changes that are kept; beyond it neighbours become one."""

Change = tuple[int, int]
"""From a call on that made so many tokens, so many bytes were held."""


class Holds(Protocol):
    """What is read of a store."""

    rule: Rule
    state: State
    tokens: int

    @property
    def bytes(self) -> int: ...

    @property
    def overhead_bytes(self) -> int: ...


class Course(NamedTuple):
    """Of the sites of one graph, kept on the first of them. A value: copies of a cache share it until they part.

    Attributes:
        slots: of each site, when the last change was noted; and places beside them.
        changes: tokens ascending.
    """

    slots: tuple[int, ...] = ()
    changes: tuple[Change, ...] = ()

    def after(self, stores: Sequence[Holds]) -> Course:
        """A call is over; what was noted of tokens that were taken back since goes. Slots change in one of about n/40
        calls: in all others this compares one integer a site.
        """
        slots = tuple([store.state.pos.shape[2] for store in stores])  # of all steps' bookkeeping, so no call for each
        if stores[0].rule.demotes:
            slots += tuple(store.state.places for store in stores)
        tokens, last = stores[0].tokens, self.changes[-1:]
        if slots == self.slots and last and last[0][0] < tokens:
            return self
        return Course(slots, thinned((*self.until(tokens), (tokens, held(stores)))))

    def until(self, tokens: int) -> tuple[Change, ...]:
        """Changes by calls that made fewer tokens."""
        return tuple(one for one in self.changes if one[0] < tokens)


def held(stores: Iterable[Holds]) -> int:
    """Bytes of all that slots hold: keys and values, positions and statistics."""
    return sum(store.bytes + store.overhead_bytes for store in stores)


def thinned(changes: tuple[Change, ...]) -> tuple[Change, ...]:
    """Of too many, each two neighbours but the newest as one, with the bytes of the larger: nothing is understated."""
    if len(changes) <= MOST:
        return changes
    half = len(changes) // 2
    pairs = zip(changes[0 : 2 * half : 2], changes[1 : 2 * half : 2], strict=True)
    return (*((a[0], max(a[1], b[1])) for a, b in pairs), *changes[2 * half :])


def together(courses: Sequence[Course], now: Change) -> list[Change]:
    """Of all graphs of a cache: bytes after each call at which any of them changed, the present at the end."""
    at = sorted({tokens for course in courses for tokens, _ in course.until(now[0])})
    changes = [(tokens, sum(_level(course.changes, tokens) for course in courses)) for tokens in at]
    return [*changes, now]


def _level(changes: Sequence[Change], tokens: int) -> int:
    """Bytes at so many tokens, 0 before the first change."""
    return next((size for at, size in reversed(changes) if at <= tokens), 0)
