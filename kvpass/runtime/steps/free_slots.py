"""Slots given back that only a call of several tokens, or the generated tokens before it, needed."""

from __future__ import annotations

from kvpass.kernels.rule import Rule
from kvpass.kernels.timing import Timing
from kvpass.runtime.step import CallFacts, Moment, Step
from kvpass.terms import Phase


class FreeSlots(Step):
    """Where only calls of several tokens evict, slots grow in between."""

    name, moment = "free_slots", Moment.AFTER
    about = "slots that only this call or the tokens before it needed are freed"

    def applies(self, rule: Rule, phase: Phase) -> bool:
        return rule[Timing].when == "calls" and phase is not Phase.DECODE

    def run(self, call: CallFacts) -> None:
        for binding, store in call.sites:
            store.give_back(store.tokens + binding.sizes["S"](call.args))
            store.outside += 1
