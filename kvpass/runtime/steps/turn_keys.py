"""Keys turned to their places in the cache after a call, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvpass.kernels.after_call.reindex import Reindex, checked, new_places, reindex, step_between
from kvpass.kernels.errors import RotationError
from kvpass.kernels.rule import Rule
from kvpass.runtime.angles import Angles
from kvpass.runtime.step import CallFacts, Moment, Step
from kvpass.runtime.store import SlotStore
from kvpass.terms import Phase


class TurnKeys(Step):
    name, moment = "turn_keys", Moment.AFTER
    about = "keys are turned to their places in the cache"

    def applies(self, rule: Rule, phase: Phase) -> bool:
        return rule[Reindex].reindex and rule.evicts

    def run(self, call: CallFacts) -> None:
        """Raises:
        RotationError: a call's positions do not rise by one, or the step between them cannot be known.
        """
        turn_keys([(b.angles, store) for b, store in call.sites], call.args, call.new)
        for store in call.stores:
            store.outside += 1


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
    with torch.autocast(stores[0].state.k.device.type, enabled=False):
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
