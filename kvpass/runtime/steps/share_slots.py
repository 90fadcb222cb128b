"""Layers that share slots by a call's data: each drops what is too much once all of them are known."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvpass.kernels.budget import kept
from kvpass.kernels.rank.replay import Replay
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rule import Rule
from kvpass.runtime.questions import staying
from kvpass.runtime.room import spare_slots
from kvpass.runtime.step import CallFacts, Moment, Step
from kvpass.runtime.store import SlotStore
from kvpass.terms import Phase


class ShareSlots(Step):
    name, moment = "share_slots", Moment.AFTER
    about = "layers share slots out by the call's data and drop what is too much, one by one"

    def applies(self, rule: Rule, phase: Phase) -> bool:
        return bool(rule[ShareOut].share) and not rule[Replay].replay and phase is not Phase.DECODE

    def run(self, call: CallFacts) -> None:
        first = call.stores[0]
        share_out(call.stores, first.tokens + call.new, staying(first, first.tokens))


def share_out(stores: Sequence[SlotStore], tokens: int, whole: torch.Tensor | None = None) -> None:
    """Drop what is above the budgets of stores that share slots out, after so many tokens, one store at a time. Layers
    whose rules share in other ways keep to themselves. whole: bool [B], rows of which nothing is dropped.
    """
    from kvpass.kernels.after_call.layers import shared_out

    together: dict[str, list[SlotStore]] = {}
    for store in stores:
        together.setdefault(store.rule[ShareOut].share, []).append(store)
    for alike in together.values():
        rules = [store.rule for store in alike]
        spare = spare_slots(kept(rules[0], tokens))
        states = shared_out([store.state for store in alike], rules, spare, whole)
        for store, (state, free) in zip(alike, states, strict=True):
            store.state, store.spare = state, free
            store.outside += 1
