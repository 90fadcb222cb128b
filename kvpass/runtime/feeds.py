"""How the inputs of a static graph are filled from those of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Feed:
    """One input of a static graph.

    Attributes:
        place: where its value is among a call's: the original inputs, state, inputs that all sites share.
        wide: axes that are as long as all tokens: it is given with columns of zeros behind them.
        length: of a number that is the past's length plus this constant; None of anything else.
    """

    place: int
    wide: tuple[int, ...] = ()
    length: int | None = None


@dataclass(frozen=True)
class Feeds:
    """All of them, in order; the last input of the graph is the position on the device, int32 [1].

    Attributes:
        checks: sizes of a call's original inputs that are taken to be the past's length plus a constant, and that.
        sizes: places of numbers that do not change from step to step.
        changed: places of original inputs that the graph changes in place.
        states, shared: places of the first tensor of the states, and of the first input that all sites share.
    """

    inputs: tuple[Feed, ...]
    checks: tuple[tuple[Callable[[Sequence[Any]], int], int], ...] = ()
    sizes: tuple[int, ...] = ()
    changed: frozenset[int] = frozenset()
    states: int = 0
    shared: int = 0
