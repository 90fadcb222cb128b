"""Layers that share slots by a call's data: each drops what is too much once all of them are known."""

from __future__ import annotations

from kvpass.kernels.budget import kept
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rule import Rule
from kvpass.runtime.room import spare_slots
from kvpass.runtime.step import CallFacts, Moment, Step
from kvpass.runtime.store import SlotStore
from kvpass.terms import Phase


class ShareSlots(Step):
    name, moment = "share_slots", Moment.AFTER
    about = "layers share slots out by the call's data and drop what is too much, one by one"

    def applies(self, rule: Rule, phase: Phase) -> bool:
        return bool(rule[ShareOut].share) and phase is not Phase.DECODE

    def run(self, call: CallFacts) -> None:
        from kvpass.kernels.after_call.layers import shared_out

        together: dict[str, list[SlotStore]] = {}
        for store in call.stores:
            together.setdefault(store.rule[ShareOut].share, []).append(store)
        for stores in together.values():
            rules = [store.rule for store in stores]
            spare = spare_slots(kept(rules[0], stores[0].tokens + call.new))
            states = shared_out([store.state for store in stores], rules, spare)
            for store, (state, free) in zip(stores, states, strict=True):
                store.state, store.spare = state, free
                store.outside += 1
