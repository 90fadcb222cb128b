"""What a site's keys are rotated by, from a call's inputs, and how far that turns from one position to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvpass.kernels.after_call.reindex import FARTHEST, step_at, turns_of


@dataclass(frozen=True)
class Positions:
    """A value of a graph that may be the positions of its tokens.

    Attributes:
        value: it, from the graph's inputs: a tensor.
        turned: cosines and sines, from the graph's inputs and another value of the same shape.
        table: whether it is an index, which must not grow beyond what the call itself asks for.
    """

    value: Callable[[Sequence[Any]], torch.Tensor]
    turned: Callable[[Sequence[Any], Any], Sequence[torch.Tensor]]
    table: bool


@dataclass(frozen=True, eq=False)
class Angles:
    """What a site's new keys are rotated by.

    Attributes:
        call: cosines and sines of a call's tokens, from the graph's inputs: [.., S, D] each, or [.., S, D / 2].
        halved: whether they stand once for both halves of a head.
        positions: what the angles may be a function of, the likeliest first.
    """

    call: Callable[[Sequence[Any]], Sequence[torch.Tensor]]
    halved: bool
    positions: tuple[Positions, ...]

    def turns(self, found: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of cosines and sines: complex128 [1 or B, S, D / 2]."""
        pairs = found[0].shape[-1] if self.halved else found[0].shape[-1] // 2
        return turns_of(*(part[..., :pairs] for part in found))

    def step(self, args: Sequence[Any]) -> torch.Tensor | None:
        """Radians per position, float64 [D / 2], from the model's function of positions; None if it is not found."""
        for one in self.positions:
            value = one.value(args)
            most = int(value.max()) if one.table else FARTHEST

            def turn(at: int, one: Positions = one, value: torch.Tensor = value) -> torch.Tensor:
                return self.turns(one.turned(args, torch.full_like(value, at)))

            step = step_at(turn, most)
            if step is not None:
                return step
        return None
