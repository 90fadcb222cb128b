"""Evictions that wait until enough generated tokens have come."""

from __future__ import annotations

from kvpass.kernels.rule import Rule
from kvpass.kernels.timing import Timing
from kvpass.runtime.step import CallFacts, Moment, Step
from kvpass.terms import Phase


class EvictWaiting(Step):
    name, moment = "evict_waiting", Moment.AFTER
    about = "what generated tokens left above the budget is evicted once enough of them have come"

    def applies(self, rule: Rule, phase: Phase) -> bool:
        return _tokens(rule) > 1

    def run(self, call: CallFacts) -> None:
        for binding, store in call.sites:
            store.waiting = store.waiting + 1 if binding.phase is Phase.DECODE else 0
            if store.waiting == _tokens(binding.rule):
                store.evict_deferred()
                store.outside += 1


def _tokens(rule: Rule) -> int:
    """How many generated tokens come before something is evicted; 1 if nothing waits."""
    return rule[Timing].every
