"""Calls that read a cache's last tokens again, and leave no trace but the scores that they give (docs/design/0021)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kvpass.errors import CacheError
from kvpass.kernels.rank.replay import Replay
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.slots.cursor import FIRST, FREE, LIVE, SEEN
from kvpass.kernels.slots.state import State
from kvpass.runtime.branches import Cuts
from kvpass.runtime.drafts import Block, drafting
from kvpass.runtime.journal import FACTS
from kvpass.runtime.shell import find
from kvpass.runtime.step import CallFacts
from kvpass.runtime.store import SlotStore


@dataclass(frozen=True)
class Rewind:
    """A store before a call whose tokens are to go.

    Attributes:
        facts: by name, of `FACTS`, and the shells that stand for it.
        kept: copies of what belongs to heads.
        whole: a copy of its state, under a rule by which the call may evict or merge; else None.
    """

    facts: dict[str, Any]
    kept: dict[str, torch.Tensor]
    whole: State | None

    @classmethod
    def of(cls, store: SlotStore) -> Rewind:
        """A store before it grows for the call."""
        facts, state = {name: getattr(store, name) for name in FACTS}, store.state
        facts |= {"shown": list(store.shown), "versions": list(store.versions)}
        with torch.inference_mode(False), torch.no_grad():
            if store.rule.evicts and not store.rule[Replay].replay:
                return cls(facts, {}, state.clone())
            heads = [one.name for one in state.fields if not one.per_slot]
            return cls(facts, {name: state[name].clone() for name in heads}, None)

    def restore(self, store: SlotStore) -> None:
        """Make the store what it was: nothing has gone in the meantime, so its newer positions go."""
        tokens = self.facts["tokens"]
        with torch.inference_mode(False), torch.no_grad():
            store.state = self._without(store.state, tokens) if self.whole is None else self.whole
        for name, value in self.facts.items():
            setattr(store, name, value)
        if self.whole is None and not store.rule[ShareOut].share:
            store.give_back(tokens)
        store.cuts = (store.cuts or Cuts()).after(tokens)

    def _without(self, state: State, tokens: int) -> State:
        state.pos.masked_fill_(state.pos >= tokens, -1)
        cursor, live = state.cursor, (state.pos >= 0).sum(-1).int()
        for column in (LIVE, FREE):
            cursor[..., column] = live
        for column in (SEEN, FIRST):
            cursor[..., column] = self.kept["cursor"][..., column]
        return state.replaced(**{**self.kept, "cursor": cursor})


@dataclass(frozen=True)
class Replaying(Block):
    """The block of one such call.

    Attributes:
        repeated: int32 [B, 2], from which to below which place of its row the call repeats.
        rewinds: what to put back.
    """

    repeated: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.int32))
    rewinds: list[tuple[SlotStore, Rewind]] = field(default_factory=list)

    @classmethod
    def of(cls, repeated: torch.Tensor) -> Replaying:
        return cls(1, single=True, repeated=repeated)

    def note(self, store: SlotStore, new: int) -> None:
        """A call of `new` tokens is about to go on from a store."""
        self.rewinds.append((store.owned(), Rewind.of(store)))

    def undo(self) -> None:
        """Make all stores of the call what they were, but for scores."""
        while self.rewinds:
            store, before = self.rewinds.pop()
            before.restore(store)


def replaying() -> Replaying | None:
    """The block that a graph's call belongs to; None if its tokens are no repetition."""
    block = drafting()
    return block if isinstance(block, Replaying) else None


def check_played(call: CallFacts) -> None:
    """Refuse a call, checked before caches are opened, that goes on from tokens which wait for their replay, or that
    brings such tokens into a preallocated cache.

    Raises:
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
