"""The compiled callable: shells in, state out of them, compiled call, shells out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvpass.errors import CacheError, PolicyError, StaleCacheError
from kvpass.kernels.timing import Timing
from kvpass.kernels.after_call.reindex import Reindex
from kvpass.kernels.budget import kept
from kvpass.kernels.errors import DataError, ScorerError, TableError
from kvpass.kernels.rank.allocate import ShareOut
from kvpass.kernels.rule import Rule
from kvpass.runtime.active import current
from kvpass.runtime.identity import Origin, Weights, require_same
from kvpass.runtime.marks import check_read, marks_of
from kvpass.runtime.shell import attach, make, of_buffer, refuse, unwrap
from kvpass.runtime.store import SlotStore, spare_slots
from kvpass.runtime.turning import Angles, turn_keys
from kvpass.terms import Layout, Phase

Size = Callable[[Sequence[Any]], int]


@dataclass(frozen=True)
class Binding:
    """How one site's state reaches a compiled graph.

    Attributes:
        past: places of the past K and V among the graph's inputs; None in prefill.
        returned: places of the K and V caches among the graph's original outputs.
        sizes: B, Hkv, D, Dv and S of a call, read from the graph's inputs; of a preallocated buffer also L, its length.
        start: where a call writes its tokens into a buffer: an index tensor or a number.
        paths: places of the buffers of K and V in their inputs, where several are stacked in one.
        host: heads and entries of the host's keys and values, where the slots hold them otherwise.
        angles: what a call's keys are rotated by, where keys are turned again.
    """

    name: str
    layer: int
    phase: Phase
    rule: Rule
    layouts: tuple[Layout, Layout]
    past: tuple[int, int] | None
    returned: tuple[tuple[int, ...], tuple[int, ...]]
    sizes: dict[str, Size]
    dtype: torch.dtype
    device: torch.device
    where: str
    start: Callable[[Sequence[Any]], Any] | None = None
    paths: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    host: tuple[tuple[int, int], tuple[int, int]] | None = None
    angles: Angles | None = None

    def open(self, args: Sequence[Any], origin: Origin, position: int = 0) -> SlotStore:
        """The store of this site for a call, with room for the call's tokens, of which the first is at `position`."""
        new = self.sizes["S"](args)
        if "L" in self.sizes:
            return self._of_buffer(args, origin, position, new)
        if self.past is None:
            return self._fresh(args, origin, new)
        key, value = (args[at] for at in self.past)
        if key.shape[self.layouts[0].token_axis] == 0:
            return self._fresh(args, origin, new)
        store = unwrap((key, value), self.layouts, self.where)
        require_same(store.origin, origin, self.where)
        store.layouts = self.layouts
        if origin.declined:
            store.origin = origin
        store.make_room(new, self.phase is Phase.DECODE)
        return store

    def _of_buffer(self, args: Sequence[Any], origin: Origin, position: int, new: int) -> SlotStore:
        if position == 0:
            store = self._fresh(args, origin, new)
            store.length = self.sizes["L"](args)
            return store
        if self.past is None or self.phase is Phase.PREFILL:
            raise StaleCacheError(
                f"the attention reads the new tokens only, but they are written at {position}", where=self.where
            )
        store = of_buffer((args[self.past[0]], args[self.past[1]]), self.paths, position, self.where)
        require_same(store.origin, origin, self.where)
        store.make_room(new, self.phase is Phase.DECODE)
        return store

    def leave(self, args: Sequence[Any], store: SlotStore) -> tuple[torch.Tensor, torch.Tensor]:
        """What the host holds as K and V after a call: shells, or its own buffers, which stand for the store."""
        if self.past is None or "L" not in self.sizes:
            return make(store, 0), make(store, 1)
        buffers = args[self.past[0]], args[self.past[1]]
        for half, buffer in enumerate(buffers):
            attach(buffer, self.paths[half], store, half)
        return buffers

    def _fresh(self, args: Sequence[Any], origin: Origin, tokens: int) -> SlotStore:
        b, hkv, d, dv = (self.sizes[letter](args) for letter in ("B", "Hkv", "D", "Dv"))
        with torch.inference_mode(False):  # a cache begun in inference mode can go on under no_grad
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            state = SlotStore.empty_state(self.rule, tokens, like, b, hkv, d, dv)
        kept = kept(self.rule, tokens)
        return SlotStore(self.name, self.layer, self.rule, self.layouts, origin, state, host=self.host, held=kept)


class Bound:
    """What a kvpass backend hands to Dynamo for a rewritten graph.

    Attributes:
        inner: the compiled rewritten graph; takes the original inputs and then five state tensors for each site.
        outputs: number of outputs of the original graph; the inner one returns those that are no cache.
        watched: places of inputs that the graph reads as data; those that are no past of a site must not be shells.
        inputs: names of the original inputs; the parameters among them tell models apart.
        shared: the inner graph's last inputs: `position`, where the call's tokens are written (buffers), `marks`.
        dense: places of outputs that are caches which stay as they are by choice.
        marks: which marks of the caller the policy reads (`Policy.marks`).
    """

    def __init__(
        self,
        inner: Callable[..., Any],
        bindings: Sequence[Binding],
        outputs: int,
        origin: Origin,
        watched: Sequence[int] = (),
        shared: tuple[str, ...] = (),
        inputs: Sequence[str] = (),
        dense: Sequence[int] = (),
        marks: tuple[str, ...] = (),
    ) -> None:
        self.shared, self.dense, self.marks, self.weights = shared, tuple(dense), marks, Weights(inputs)
        self.inner, self.bindings, self.origin = inner, tuple(bindings), origin
        self.watched = tuple(at for at in watched if not any(at in (b.past or ()) for b in bindings))
        cached = {at for b in bindings for half in b.returned for at in half}
        self.kept = [at for at in range(outputs) if at not in cached]
        self.outputs = outputs

    def __call__(self, *args: Any) -> list[Any]:
        refuse(args, self.watched, "")
        check_read(self.marks, self._where())
        positions = written_at(self.bindings, args)
        origin = self._origin_of(args)
        stores = [b.open(args, origin, at) for b, at in zip(self.bindings, positions, strict=True)]
        if len({id(store) for store in stores}) < len(stores):
            raise StaleCacheError(
                "several layers were given the same cache",
                where=self._where(),
                hint="give each layer what it returned itself, or a copy.deepcopy of it",
            )
        results = self._run(args, stores, [self._given(name, args, stores, positions) for name in self.shared])
        self._share_out(args, stores)
        self._settle(args, stores)
        self._reindex(args, stores)
        returned: list[Any] = [None] * self.outputs
        for at, value in zip(self.kept, results, strict=True):
            returned[at] = value
        shells: list[torch.Tensor] = []
        for binding, store in zip(self.bindings, stores, strict=True):
            store.tokens += binding.sizes["S"](args)
            store.calls += 1
            shells += binding.leave(args, store)
            for places, shell in zip(binding.returned, shells[-2:], strict=True):
                for at in places:
                    returned[at] = shell
        call = current()
        if call is not None:
            call.ran(stores, shells, [returned[at] for at in self.dense])
        return returned

    def _origin_of(self, args: Sequence[Any]) -> Origin:
        """The origin of this call's stores: whose parameters it was given."""
        model = self.weights.of(args, fresh=self.bindings[0].phase is Phase.PREFILL)
        if model is not self.origin.model:
            self.origin = replace(self.origin, model=model)
        return self.origin

    def _given(self, name: str, args: Sequence[Any], stores: Sequence[SlotStore], positions: Sequence[int]) -> Any:
        """The value of an input that all sites share."""
        if name == "position":
            return max(positions)
        first = self.bindings[0]
        return marks_of(first.sizes["B"](args), first.sizes["S"](args), stores[0].tokens, first.device)

    def _run(self, args: Sequence[Any], stores: Sequence[SlotStore], shared: Sequence[Any]) -> Any:
        """The compiled call. If it fails, it may have changed the state of some layers."""
        with self._told(stores):
            return self.inner(*args, *(t for store in stores for t in store.state), *shared)

    @contextmanager
    def _told(self, stores: Sequence[SlotStore]) -> Iterator[None]:
        """Mark the stores as spoiled if something fails inside, and say where."""
        try:
            yield
        except BaseException as error:
            for store in stores:
                store.spoiled = True
            if isinstance(error, DataError):
                kind = PolicyError if isinstance(error, (ScorerError, TableError)) else CacheError
                raise kind(str(error), where=self._where(), hint=error.hint) from error
            raise

    def _share_out(self, args: Sequence[Any], stores: Sequence[SlotStore]) -> None:
        """After a call of several tokens: layers that share slots by its data drop what is too much, one by one."""
        pairs = zip(self.bindings, stores, strict=True)
        sharing = [store for b, store in pairs if b.rule[ShareOut].share and b.phase is not Phase.DECODE]
        if not sharing:
            return
        from kvpass.kernels.after_call.layers import shared_out

        tokens = sharing[0].tokens + self.bindings[0].sizes["S"](args)
        spare = spare_slots(sharing[0].rule.kept(tokens))
        with torch.inference_mode(False), torch.no_grad(), self._told(stores):
            states = shared_out([store.state for store in sharing], [store.rule for store in sharing], spare)
            for store, (state, free) in zip(sharing, states, strict=True):
                store.state, store.spare = state, free
                store.outside += 1

    def _settle(self, args: Sequence[Any], stores: Sequence[SlotStore]) -> None:
        """After a call of several tokens, free slots that only the call or the steps before it needed; after a step,
        drop what waited, if enough has come.
        """
        for b, store in zip(self.bindings, stores, strict=True):
            step = b.phase is Phase.DECODE
            evicted = not step and b.rule.of_call(store.tokens) is b.rule
            if evicted and b.rule[Timing].when == "calls":
                store.give_back(store.tokens + b.sizes["S"](args))
                store.outside += 1
            if b.rule[Timing].every > 1:
                store.waiting = store.waiting + 1 if step else 0
                if store.waiting == b.rule[Timing].every:
                    with self._told(stores):
                        store.evict_late()
                    store.outside += 1

    def _reindex(self, args: Sequence[Any], stores: Sequence[SlotStore]) -> None:
        """Turn the keys of sites that want it to their places in the cache."""
        pairs = zip(self.bindings, stores, strict=True)
        sites = [(b.angles, store) for b, store in pairs if b.rule[Reindex].reindex and b.rule.evicts]
        if sites:
            with torch.inference_mode(False), torch.no_grad(), self._told(stores):
                turn_keys(sites, args, self.bindings[0].sizes["S"](args))
                for _, store in sites:
                    store.outside += 1

    def _where(self) -> str:
        first, count = self.bindings[0].where, len(self.bindings)
        return first if count == 1 else f"one of {count} sites, of which the first is {first}"


def written_at(bindings: Sequence[Binding], args: Sequence[Any]) -> list[int]:
    """Where each site's tokens are written into its buffer, 0 for caches that grow. Reads index tensors of all sites
    at once: one synchronisation with a device.

    Raises:
        StaleCacheError: the tokens are not written one after the other, or layers disagree where.
    """
    starts: list[Any] = [b.start(args) if b.start is not None else 0 for b in bindings]
    tensors = [at for at, value in enumerate(starts) if isinstance(value, torch.Tensor)]
    if tensors:
        read = torch.stack([_first_and_gap(starts[at]) for at in tensors]).tolist()
        for at, (first, gap) in zip(tensors, read, strict=True):
            starts[at] = first if gap == 0 else -1
    growing = {at for at, b in zip(starts, bindings, strict=True) if b.start is not None}
    if len(growing) > 1 or min(starts, default=0) < 0:
        raise StaleCacheError(
            f"new tokens are written at {sorted(growing)}" if len(growing) > 1 else "new tokens are written with gaps",
            where=bindings[0].where,
            hint="write each call's tokens one after the other, at the same place in all layers",
        )
    return [int(at) for at in starts]


def _first_and_gap(index: torch.Tensor) -> torch.Tensor:
    """The first place, and how far the others are from following it."""
    flat = index.reshape(-1)
    straight = torch.arange(len(flat), device=flat.device, dtype=flat.dtype)
    return torch.stack([flat[0], (flat - flat[0] - straight).abs().max()])
