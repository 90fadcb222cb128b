"""The compiled callable: shells in, state out of them, compiled call between the plan's steps, shells out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from kvpass.errors import CacheError, PolicyError, StaleCacheError
from kvpass.kernels.errors import DataError, ScorerError, TableError
from kvpass.runtime.active import current
from kvpass.runtime.binding import Binding
from kvpass.runtime.captured import Captured
from kvpass.runtime.drafts import drafting
from kvpass.runtime.identity import Origin, Weights
from kvpass.runtime.shell import refuse
from kvpass.runtime.step import CallFacts, Moment, PlannedStep, SharedInput
from kvpass.runtime.store import SlotStore
from kvpass.terms import Phase


class Bound:
    """What a kvpass backend hands to Dynamo for a rewritten graph.

    Attributes:
        inner: the compiled rewritten graph; takes the original inputs, then the state tensors of each site, then
            `shared`.
        outputs: number of outputs of the original graph; the inner one returns those that are no cache.
        watched: places of inputs that the graph reads as data; those that are no past of a site must not be shells.
        steps: what the plan put before and after a call, by moment, in order.
        shared: the inner graph's last inputs, which all sites share, in order.
        inputs: names of the original inputs; the parameters among them tell models apart.
        dense: places of outputs that are caches which stay as they are by choice.
        captured: runs the graph as a recording of the device, in the place of `inner`.
        eager: why there is none though the caller asked for it; counted with each step.
    """

    def __init__(
        self,
        inner: Callable[..., Any],
        bindings: Sequence[Binding],
        outputs: int,
        origin: Origin,
        watched: Sequence[int] = (),
        steps: Sequence[PlannedStep] = (),
        shared: Sequence[SharedInput] = (),
        inputs: Sequence[str] = (),
        dense: Sequence[int] = (),
        captured: Captured | None = None,
        eager: str = "",
    ) -> None:
        self.steps = {moment: [one for one in steps if one.step.moment is moment] for moment in Moment}
        self.shared, self.dense, self.weights = tuple(shared), tuple(dense), Weights(inputs)
        self.inner, self.bindings, self.origin = inner, tuple(bindings), origin
        self.watched = tuple(at for at in watched if not any(at in (b.past or ()) for b in bindings))
        cached = {at for b in bindings for half in b.returned for at in half}
        self.kept = [at for at in range(outputs) if at not in cached]
        self.outputs, self.buffered = outputs, any(b.start is not None for b in bindings)
        self.captured, self.eager = captured, eager
        first, count = self.bindings[0].where, len(self.bindings)
        self.where = first if count == 1 else f"one of {count} sites, of which the first is {first}"

    def __call__(self, *args: Any) -> list[Any]:
        refuse(args, self.watched, "")
        call = CallFacts(args, self.bindings, self.bindings[0].sizes["S"](args), self.where)
        for one in self.steps[Moment.CHECK]:
            one.step.run(call.of(one.sites))
        call = self._opened(call)
        shared = [one.value(call) for one in self.shared]  # what the caller said wrongly has changed nothing yet
        with self._told(call.stores):
            self._do(Moment.BEFORE, call)
            results = self._run(call, shared)
            self._do(Moment.AFTER, call)
            return self._returned(call, results)

    def _do(self, moment: Moment, call: CallFacts) -> None:
        """The steps next to the compiled call."""
        for one in self.steps[moment]:
            with torch.inference_mode(False), torch.no_grad():
                one.step.run(call.of(one.sites))

    def _opened(self, call: CallFacts) -> CallFacts:
        """The call with its stores, each with room for the call's tokens.

        Raises:
            StaleCacheError: several sites were given the same one.
        """
        positions = written_at(self.bindings, call.args) if self.buffered else [0] * len(self.bindings)
        origin = self._origin_of(call.args)
        recorded, drafts = self.captured is not None, drafting()
        pairs = zip(self.bindings, positions, strict=True)
        stores = tuple(b.open(call.args, origin, at, recorded, drafts) for b, at in pairs)
        if len({id(store) for store in stores}) < len(stores):
            raise StaleCacheError(
                "several layers were given the same cache",
                where=self.where,
                hint="give each layer what it returned itself, or a copy.deepcopy of it",
            )
        if drafts is None and stores[0].journal is not None:  # what it goes on from stays
            for store in stores:
                store.journal = None
        return replace(call, stores=stores, positions=tuple(positions))

    def _origin_of(self, args: Sequence[Any]) -> Origin:
        """The origin of this call's stores: whose parameters it was given."""
        model = self.weights.of(args, fresh=self.bindings[0].phase is Phase.PREFILL)
        origin = self.origin  # another thread may change it
        if model is not origin.model:
            origin = self.origin = replace(origin, model=model)
        return origin

    def _run(self, call: CallFacts, shared: Sequence[Any]) -> Any:
        """The compiled call."""
        given = [*call.args]
        for store in call.stores:
            given += store.state.tensors()
        given += shared
        if self.eager:
            call.stores[0].steps = call.stores[0].steps.launched(self.eager)
        return self.inner(*given) if self.captured is None else self.captured(call, given)

    def _returned(self, call: CallFacts, results: Sequence[Any]) -> list[Any]:
        """The original graph's outputs: those of the inner one, and shells or buffers in the place of caches."""
        returned: list[Any] = [None] * self.outputs
        for at, value in zip(self.kept, results, strict=True):
            returned[at] = value
        shells: list[torch.Tensor] = []
        for binding, store in call.sites:
            store.tokens += binding.sizes["S"](call.args)
            store.calls += 1
            shells += binding.leave(call.args, store)
            for places, shell in zip(binding.returned, shells[-2:], strict=True):
                for at in places:
                    returned[at] = shell
        first = call.stores[0]
        first.course = first.course.after(call.stores)
        noted = current()
        if noted is not None:
            noted.ran(call.stores, shells, [returned[at] for at in self.dense])
        return returned

    @contextmanager
    def _told(self, stores: Sequence[SlotStore]) -> Iterator[None]:
        """Mark the stores as spoiled if something fails inside, an interrupt at any place of it too: the state of some
        layers may have changed, and their tokens are not counted. Say where.
        """
        try:
            yield
        except BaseException as error:
            for store in stores:
                store.spoiled = True
            if isinstance(error, DataError):
                kind = PolicyError if isinstance(error, (ScorerError, TableError)) else CacheError
                raise kind(str(error), where=self.where, hint=error.hint) from error
            raise


def written_at(bindings: Sequence[Binding], args: Sequence[Any]) -> list[int]:
    """Where each site's tokens are written into its buffer, 0 for caches that grow. Reads index tensors of all sites
    at once: one synchronisation with a device.

    Raises:
        StaleCacheError: the tokens are not written one after the other, or layers disagree where.
    """
    starts: list[Any] = [b.start(args) if b.start is not None else 0 for b in bindings]
    tensors = [at for at, value in enumerate(starts) if isinstance(value, torch.Tensor)]
    if tensors:
        parts = [starts[at] for at in tensors]
        single = all(part.numel() == 1 for part in parts)  # a step's: nothing to compute
        new = bindings[0].sizes["S"](args) if not single else 1
        pairs = [part.reshape(1) for part in parts] if single else [_first_and_gap(part, new) for part in parts]
        read = torch.stack(pairs).tolist()
        for at, (first, *gap) in zip(tensors, read, strict=True):
            starts[at] = -1 if any(gap) else first
    growing = {at for at, b in zip(starts, bindings, strict=True) if b.start is not None}
    if len(growing) > 1 or min(starts, default=0) < 0:
        raise StaleCacheError(
            f"new tokens are written at {sorted(growing)}" if len(growing) > 1 else "new tokens are written with gaps",
            where=bindings[0].where,
            hint="write each call's tokens one after the other, at the same place in all layers",
        )
    return [int(at) for at in starts]


def _first_and_gap(index: torch.Tensor, new: int) -> torch.Tensor:
    """The first of `new` places, and how far the others are from following it; of all rows, if it has several."""
    rows = index.reshape(-1, new) if index.numel() % new == 0 else index.reshape(1, -1)
    straight = torch.arange(rows.shape[1], device=rows.device, dtype=rows.dtype)
    return torch.stack([rows[0, 0], (rows - rows[0, 0] - straight).abs().max()])
