"""Keys turned to their places in the cache after a call, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvpass.kernels.after_call.reindex import FARTHEST, checked, new_places, reindex, step_at, step_between, turns_of
from kvpass.kernels.errors import RotationError
from kvpass.runtime.store import SlotStore


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


def turn_keys(sites: Sequence[tuple[Angles | None, SlotStore]], args: Sequence[Any], count: int) -> None:
    """Turn the keys of stores whose call of `count` tokens is over, but for `store.tokens`, to their places.

    Raises:
        RotationError: a call's positions do not rise by one, or the step between them cannot be known.
    """
    together: dict[Any, list[SlotStore]] = {}
    for angles, store in sites:
        together.setdefault(angles, []).append(store)
    for angles, stores in together.items():
        if angles is not None:
            _learn(angles, stores, args, count)
        for store in stores:
            if store.step is None:
                raise _unknown()
            reindex(store.state, store.rule, store.step)


def _learn(angles: Angles, stores: Sequence[SlotStore], args: Sequence[Any], count: int) -> None:
    """Learn the step from a cache's first call; of each call see that its keys stand where their places say."""
    with torch.autocast(stores[0].state[0].device.type, enabled=False):
        turn = angles.turns(angles.call(args))
        step = stores[0].step if stores[0].step is not None else angles.step(args)
    # a token that comes alone is kept by all layers, or stands nowhere
    seen = stores if count > 1 else stores[:1]
    places = [new_places(s.state, s.rule, s.tokens, count).to(turn.device) for s in seen]
    place = torch.stack(places).amax(0)
    step = step_between(turn, place) if step is None else step
    if step is None:
        raise _unknown()
    zero = checked(turn, place, step, stores[0].zero)
    for store in stores:
        store.step, store.zero = step, zero


def _unknown() -> RotationError:
    return RotationError(
        "how far keys turn from one position to the next is not to be read from this model's graph, and the first call "
        "of this cache has no two tokens to measure it by",
        "begin with a prompt of two tokens or more, or choose a policy with positions: kept, e.g. streaming_llm",
    )
