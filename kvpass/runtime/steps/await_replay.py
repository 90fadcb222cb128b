"""Calls whose tokens are to be replayed before anything is evicted: who feeds them again is not in the graph."""

from __future__ import annotations

from kvpass.kernels.rank.replay import Replay
from kvpass.kernels.rule import Rule
from kvpass.runtime.questions import staying, unread
from kvpass.runtime.replaying import check_played, replaying
from kvpass.runtime.step import CallFacts, Moment, Step
from kvpass.runtime.steps.share_slots import share_out
from kvpass.runtime.store import SlotStore
from kvpass.terms import Phase


class CheckReplay(Step):
    name, moment = "check_replay", Moment.CHECK
    about = "a cache whose last tokens were not replayed yet is refused, and one that is preallocated"

    def applies(self, rule: Rule, phase: Phase) -> bool:
        return rule[Replay].replay > 0

    def run(self, call: CallFacts) -> None:
        """Raises:
        CacheError: naming the layer, and who can replay.
        """
        check_played(call)


class AwaitReplay(Step):
    """Tokens of a later call that is too short for a replay rank as generated ones do, and as those may, or may not,
    make others go.
    """

    name, moment = "await_replay", Moment.AFTER
    about = "all tokens stay until the call's own are replayed; then slots are shared out by what that gave"

    def applies(self, rule: Rule, phase: Phase) -> bool:
        return rule[Replay].replay > 0 and phase is not Phase.DECODE

    def run(self, call: CallFacts) -> None:
        if replaying() is not None:
            return
        short: list[SlotStore] = []
        for store in call.stores:
            store.unplayed = call.new
            if bool(unread(store, store.tokens).all()):
                store.unplayed = 0
                short.append(store)
        if short:
            share_out(short, short[0].tokens + call.new, staying(short[0], short[0].tokens))
