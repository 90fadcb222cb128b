"""A decode graph that a device records once and replays at each step (docs/design/0010).

A recording is good for the addresses of state and weights and for the sizes that it was made with: they are its key.
What else changes from call to call is copied into memory of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from itertools import count
from typing import Any

import torch

from kvpass.runtime.feeds import Feed, Feeds
from kvpass.runtime.graph_device import Recording
from kvpass.runtime.recordings import Failure, Recordings
from kvpass.runtime.step import CallFacts

LEAST_WIDTH = 256
"""Columns of padded inputs, at least; more of them double, so that n tokens are recorded log2(n / 256) times for it."""

GIVE_UP = 12
"""Sizes or addresses that were new one after the other, and none of them met twice: recording does not pay."""

_NUMBER = count()


class Captured:
    """Runs a static graph: the first step of a key is launched, the second recorded and replayed, all others replayed.

    Attributes:
        run: the compiled static graph.
        otherwise: the rewritten graph as it was, for calls that do not fit; it takes all inputs.
    """

    def __init__(
        self, run: Callable[..., Any], otherwise: Callable[..., Any], feeds: Feeds, recordings: Recordings
    ) -> None:
        self.run, self.otherwise, self.feeds, self.recordings = run, otherwise, feeds, recordings
        self.name = next(_NUMBER)
        self.seen: dict[int, weakref.ref[torch.Tensor]] = {}
        self.moving: set[int] = set()
        self.fixed: list[int] = []
        self.states: list[int] = []
        self.fresh = 0
        self.refused = ""

    def __call__(self, call: CallFacts, given: Sequence[Any]) -> Any:
        """One step. `given`: the original inputs, the state of all sites, inputs that all sites share."""
        at = call.stores[0].tokens
        why = self._unfit(call, at)
        if why:
            return self._counted(call, why, self.otherwise(*given))
        if self.refused:
            return self._counted(call, self.refused, self._launched(at, given))
        with self.recordings.lock, torch.no_grad():
            return self._step(call, at, given)

    def _unfit(self, call: CallFacts, at: int) -> str:
        """Why a call is not one that the static graph is for."""
        if any(store.tokens != at for store in call.stores):
            return "layers have seen different numbers of tokens"
        if any(read(call.args) != at + more for read, more in self.feeds.checks):
            return "a mask is not as long as the tokens so far"
        return ""

    def _step(self, call: CallFacts, at: int, given: Sequence[Any]) -> Any:
        key = self._key(call, at, given)
        known: Known | None = self.recordings.find(key)
        if known is None:
            self.fresh += 1
            if self.fresh > GIVE_UP:
                self._refuse(Failure("sizes or addresses change from step to step", False))
            else:
                self.recordings.keep(key, Known())
            return self._counted(call, "first of its sizes and addresses", self._launched(at, given))
        recorded = known.recording is None
        if known.recording is None:
            with torch.inference_mode(False):
                known.inputs = Inputs(self.feeds, self.moving, width_of(at), call.stores[0].state.k.device, given)
                known.inputs.fill(at, given)
            made = self.recordings.record(known.inputs.at.device, self.run, known.inputs.values)
            known.inputs.values = []  # the device knows their addresses; caches and weights are others'
            if isinstance(made, Failure):
                self._refuse(made)
                return self._counted(call, made.why, self._launched(at, given))
            known.recording = made
        else:
            known.inputs.fill(at, given)
            self.fresh = 0
        known.recording.replay()
        store = call.stores[0]
        store.steps = store.steps.replayed(recorded)
        return [known.inputs.own(value) for value in known.recording.outputs]

    def _refuse(self, failure: Failure) -> None:
        self.refused = "" if failure.again else failure.why
        self.recordings.drop(self.name)

    def _key(self, call: CallFacts, at: int, given: Sequence[Any]) -> Hashable:
        """What a recording is good for."""
        if not self.seen:
            self._look(given)
        fixed = [given[place].data_ptr() for place in self.fixed]
        state = [given[place].data_ptr() for place in self.states]
        key = self.name, width_of(at), *(given[place] for place in self.feeds.sizes), *fixed, *state
        key = *key, *(size for store in call.stores for size in (store.slots, store.state.places))
        if key not in self.recordings.kept and self._look(given):
            return self._key(call, at, given)
        return key

    def _look(self, given: Sequence[Any]) -> bool:
        """See which tensors are no longer the same objects: those move from now on, and are copied. Whether there are
        more of them than before.
        """
        if not self.seen:
            plain = [feed.place for feed in self.feeds.inputs if not feed.wide and feed.length is None]
            tensors = [place for place in plain if isinstance(given[place], torch.Tensor)]
            first, shared = self.feeds.states, self.feeds.shared
            self.states = [place for place in tensors if first <= place < shared or place in self.feeds.changed]
            self.moving |= {place for place in tensors if place >= shared}
            self.fixed = [place for place in tensors if place < first and place not in self.feeds.changed]
        moved = {at for at in self.fixed if at in self.seen and self.seen[at]() is not given[at]}
        self.seen = {at: weakref.ref(given[at]) for at in self.fixed if at not in moved}
        if moved:
            self.moving |= moved
            self.fixed = [at for at in self.fixed if at not in moved]
            self.recordings.drop(self.name)
        return bool(moved)

    def _launched(self, at: int, given: Sequence[Any]) -> Any:
        """The static graph, launched kernel by kernel."""
        device = given[self.feeds.states].device
        inputs = Inputs(self.feeds, set(), width_of(at), device, given)
        inputs.fill(at, given)
        return self.run(*inputs.values)

    def _counted(self, call: CallFacts, why: str, results: Any) -> Any:
        store = call.stores[0]
        store.steps = store.steps.launched(why)
        return results


class Known:
    """A key: its recording, once there is one, and the inputs of that."""

    def __init__(self) -> None:
        self.recording: Recording | None = None
        self.inputs: Inputs


class Inputs:
    """Inputs of a static graph: a call's own tensors, and memory for what is copied.

    Args:
        moving: places of tensors that are copied.
    """

    def __init__(self, feeds: Feeds, moving: set[int], width: int, device: torch.device, given: Sequence[Any]) -> None:
        self.feeds, self.width = feeds, width
        self.at = torch.zeros(1, dtype=torch.int32, device=device)
        self.copied: list[tuple[int, torch.Tensor]] = []
        self.padded: list[tuple[Feed, torch.Tensor]] = []
        self.length = 0
        self.values = [self._value(feed, feed.place in moving, given[feed.place]) for feed in feeds.inputs]
        self.values.append(self.at)
        ours = {id(memory) for _, memory in (*self.copied, *self.padded)} | {id(self.at)}
        others = [value for value in self.values if isinstance(value, torch.Tensor) and id(value) not in ours]
        self.given = {value.untyped_storage().data_ptr() for value in others}

    def _value(self, feed: Feed, moves: bool, value: Any) -> Any:
        if feed.length is not None:
            return self.width - 1 + feed.length
        if feed.wide:
            shape = [self.width if axis in feed.wide else size for axis, size in enumerate(value.shape)]
            self.padded.append((feed, value.new_zeros(shape)))
            return self.padded[-1][1]
        if not moves:
            return value
        self.copied.append(
            (feed.place, torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device))
        )
        return self.copied[-1][1]

    def fill(self, at: int, given: Sequence[Any]) -> None:
        """For a call whose token stands at `at`."""
        self.at.fill_(at)
        for place, memory in self.copied:
            once(memory).copy_(once(given[place]))
        for feed, memory in self.padded:
            if at < self.length:
                memory.zero_()
            value, part = given[feed.place], memory
            for axis in feed.wide:
                part = part.narrow(axis, 0, value.shape[axis])
            part.copy_(value)
        self.length = at

    def own(self, value: Any) -> Any:
        """An output for the caller, which the next step leaves alone; what is a call's own tensor stays that."""
        shared = not isinstance(value, torch.Tensor) or value.untyped_storage().data_ptr() in self.given
        return value if shared else value.clone()


def once(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without the repetitions of an `expand`."""
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        tensor = tensor.narrow(axis, 0, 1) if stride == 0 and size > 1 else tensor
    return tensor


def width_of(at: int) -> int:
    """Columns of padded inputs for a token that stands at `at`: a power of two."""
    return max(LEAST_WIDTH, 1 << at.bit_length())
