"""Calls whose tokens are to be replayed before anything is evicted: who feeds them again is not in the graph."""

from __future__ import annotations

from kvpass.errors import CacheError
from kvpass.kernels.rank.replay import Replay
from kvpass.kernels.rule import Rule
from kvpass.runtime.replaying import replaying
from kvpass.runtime.shell import find
from kvpass.runtime.step import CallFacts, Moment, Step
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
        for binding in call.bindings:
            if "L" in binding.sizes:
                raise CacheError(
                    "a policy that replays prompts was given a preallocated cache, which has no room for them twice",
                    where=binding.where,
                    hint="let the cache grow: a DynamicCache, or leave cache_implementation out",
                )
            store = find(call.args[binding.past[0]]) if binding.past is not None else None
            if store is not None and store.unplayed and replaying() is None:
                raise CacheError(
                    f"the last {store.unplayed} tokens of this cache were not replayed, so nothing was evicted",
                    where=binding.where,
                    hint="call kvpass.replay(model, cache, ids) with their ids: kvpass.compile does so by itself only "
                    "for calls with input_ids, a cache, and a mask of two dimensions or none",
                )


class AwaitReplay(Step):
    name, moment = "await_replay", Moment.AFTER
    about = "all tokens stay until the call's own are replayed; then slots are shared out by what that gave"

    def applies(self, rule: Rule, phase: Phase) -> bool:
        return rule[Replay].replay > 0 and phase is not Phase.DECODE

    def run(self, call: CallFacts) -> None:
        if replaying() is None:
            for store in call.stores:
                store.unplayed = call.new
