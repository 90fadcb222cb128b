"""How one site's state reaches a compiled graph: its store before a call, what the host holds after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvpass.errors import CacheError, StaleCacheError
from kvpass.kernels.budget import kept
from kvpass.kernels.rule import Rule
from kvpass.runtime.angles import Angles
from kvpass.runtime.drafts import Block
from kvpass.runtime.identity import Origin, require_same
from kvpass.runtime.room import empty_state
from kvpass.runtime.shell import attach, make, of_buffer, unwrap
from kvpass.runtime.store import SlotStore
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
        joined: keys and values are parts of one tensor of the host.
        renews: of a buffer, the host goes on with what the graph returns, not with what it gave.
        ends: how many tokens of its buffers a call reads, where its graph does not tell that the new ones are the last;
            and whether a mask hides what is behind them.
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
    joined: bool = False
    renews: bool = False
    ends: tuple[tuple[Size, bool], ...] = ()

    def open(
        self,
        args: Sequence[Any],
        origin: Origin,
        position: int = 0,
        recorded: bool = False,
        drafts: Block | None = None,
    ) -> SlotStore:
        """The store of this site for a call, with room for the call's tokens, of which the first is at `position`.

        recorded: the call's graph is replayed where addresses are what they were.
        drafts: what the call's tokens are tentative in, if they go on from a cache.
        """
        new = self.sizes["S"](args)
        if "L" in self.sizes:
            return self._of_buffer(args, origin, position, new, recorded, drafts)
        if self.past is None:
            return self._fresh(args, origin, new)
        key, value = (args[at] for at in self.past)
        if key.shape[self.layouts[0].token_axis] == 0:
            return self._fresh(args, origin, new)
        past = (key,) if self.joined else (key, value)
        store = unwrap(past, self.layouts[: len(past)], self.where)
        require_same(store.origin, origin, self.where)
        store.layouts = self.layouts
        if origin.declined:
            store.origin = origin
        store.recorded = recorded
        if drafts is not None:
            drafts.note(store, new)
        store.make_room(new, self.phase is Phase.DECODE)
        return store

    def _of_buffer(
        self, args: Sequence[Any], origin: Origin, position: int, new: int, recorded: bool, drafts: Block | None
    ) -> SlotStore:
        self._check_read(args, position + new)
        if position == 0:
            store = self._fresh(args, origin, new)
            store.length = self.sizes["L"](args)
            return store
        if self.past is None or self.phase is Phase.PREFILL:
            raise StaleCacheError(
                f"the attention reads the new tokens only, but they are written at {position}", where=self.where
            )
        places = self.past[:1] if self.joined else self.past
        buffers = tuple(args[at] for at in places)
        store = of_buffer(buffers, self.paths[: len(buffers)], position, self.where)
        require_same(store.origin, origin, self.where)
        if len(store.state.cursor) != self.sizes["B"](args):
            raise StaleCacheError(
                f"{self.sizes['B'](args)} sequences go on, but the cache was begun with {len(store.state.cursor)}",
                where=self.where,
                hint="run each batch from its own prompt",
            )
        store.recorded = recorded
        if drafts is not None:
            drafts.note(store, new)
        store.make_room(new, self.phase is Phase.DECODE)
        return store

    def _check_read(self, args: Sequence[Any], written: int) -> None:
        """A call reads its buffers up to its last token, or further under a mask; and both are as long.

        Raises:
            CacheError: it does not.
        """
        for size, masked in self.ends:
            end = size(args)
            if end < written or (end > written and not masked):
                raise CacheError(
                    f"the attention reads {end} tokens of its buffer, of which {written} are written",
                    where=self.where,
                    hint="read up to where the new tokens end, or hide what lies behind them by a mask",
                )
        if self.past is not None and self.paths == ((), ()) and not self.joined:
            long = [args[at].shape[layout.token_axis] for at, layout in zip(self.past, self.layouts, strict=True)]
            if long[0] != long[1]:
                raise CacheError(
                    f"the buffer of keys has room for {long[0]} tokens, that of values for {long[1]}",
                    where=self.where,
                    hint="give both the same length",
                )

    def leave(self, args: Sequence[Any], store: SlotStore) -> tuple[torch.Tensor, torch.Tensor]:
        """What the host holds as K and V after a call: shells, or its own buffers, which stand for the store."""
        if self.past is None or "L" not in self.sizes or self.renews:
            key = make(store, 0)
            return key, key if self.joined else make(store, 1)
        buffers = args[self.past[0]], args[self.past[1]]
        for half, buffer in enumerate(buffers[:1] if self.joined else buffers):
            attach(buffer, self.paths[half], store, half)
        return buffers

    def _fresh(self, args: Sequence[Any], origin: Origin, tokens: int) -> SlotStore:
        sizes = {letter: self.sizes[letter](args) for letter in ("B", "Hkv", "D", "Dv")}
        with torch.inference_mode(False):  # a cache begun in inference mode can go on under no_grad
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            state = empty_state(self.rule, tokens, like, sizes)
        used = kept(self.rule, tokens)
        return SlotStore(self.name, self.layer, self.rule, self.layouts, origin, state, host=self.host, used=used)
