"""SlotStore: the compact cache of one site, its growth and its bytes."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet, WeakValueDictionary, ref

import torch

from kvpass.errors import CacheError
from kvpass.kernels.budget import kept, within
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import LIVE, SEEN
from kvpass.kernels.slots.moves import evened, with_slots, with_spare
from kvpass.kernels.slots.state import State
from kvpass.runtime.course import Course
from kvpass.runtime.identity import Origin
from kvpass.runtime.lending import Lending
from kvpass.runtime.recordings import StepCounts
from kvpass.runtime.room import in_place, spare_slots, with_room, with_room_beside
from kvpass.terms import Layout

if TYPE_CHECKING:
    from kvpass.runtime.branches import Cuts

LEAST_ROOM = 32
"""Slots by which a state grows at least where steps are recorded: one recording for so many kept tokens."""

_BY_STORAGE: WeakValueDictionary[int, SlotStore] = WeakValueDictionary()


class Pick(NamedTuple):
    """Rows of a store, int64 [n], what they became, and the half (0 keys, 1 values) that is still to be picked."""

    rows: torch.Tensor
    store: SlotStore
    half: int


@dataclass(eq=False)
class SlotStore(Lending):
    """State of one site (docs/design/0001) and the logical length.

    Attributes:
        state: keys, values, positions, statistics and cursor, and whatever else the rule's fields are. Heads with
            budgets of their own lie one behind the other in the same memory (`kvpass.kernels.slots.ragged`).
        tokens: logical length, padding included; what the host believes its cache holds.
        host: heads and entries of keys and of values in the host's cache, where the slots hold them otherwise: both as
            the key (latent attention), or all heads side by side (mixed heads).
        length: tokens that the host's preallocated buffer has room for; None for a cache that grows.
        bases: NaN tensors under the shells of K and V: one element, or a row where shells are written into.
        versions: of the host's tensors for K and V, as the last call left them; None if torch does not count them, or
            if this is a copy.
        shown: shells of K and V that the last call left, and of how many tokens; None likewise.
        sizes: of the shells of K and V in one layout of the host's, with the length of the last one.
        held: tensors whose memory the caller's buffers of K and V lie in.
        spoiled: a call failed halfway, and may or may not have changed the state.
        used: slots in use, at most; of heads with budgets of their own on average. Not where layers `ShareOut`.
        waiting: steps since something was evicted, where `Timing.every` lets them wait.
        spare: tokens that may still come one by one before the slots must be laid out anew; where layers `ShareOut`.
        calls: made on this cache so far.
        outside: how often something was done to its slots after a call, outside the compiled graph.
        step: radians that each pair of a key's entries turns from position to position, float64 [D / 2]; where
            the rule is to `Reindex`, from the first call on.
        zero: how far place 0 of each row is turned, complex128 [B, D / 2], 0 for rows without a token; likewise.
        picked: rows that were picked out of this store for one of K and V, until they are for the other one.
        lent: the stores that share this one's state (`owned`); None if none does.
        steps: what became of them under `mode="reduce-overhead"`; counted on the first site of each graph.
        recorded: steps are replayed, so that the state's addresses change as seldom as may be.
        journal: a `Journal` of its last tokens, while they are tentative.
        cuts: when tokens were taken back; None: never.
        course: how much it and the other sites of its graph held after their calls; on the first of them.
        unplayed: the last so many tokens wait for their replay, and with them all eviction.
    """

    name: str
    layer: int
    rule: Rule
    layouts: tuple[Layout, Layout]
    origin: Origin
    state: State
    tokens: int = 0
    length: int | None = None
    host: tuple[tuple[int, int], tuple[int, int]] | None = None
    bases: tuple[torch.Tensor, torch.Tensor] = field(init=False)
    versions: list[int | None] = field(init=False)
    shown: list[tuple[ref[torch.Tensor], int] | None] = field(init=False)
    held: list[ref[torch.Tensor] | None] = field(init=False)
    sizes: list[tuple[Layout, list[int]] | None] = field(init=False)
    spoiled: bool = False
    used: int = 0
    waiting: int = 0
    spare: int = 0
    calls: int = 0
    outside: int = 0
    step: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    picked: list[Pick] = field(default_factory=list)
    lent: WeakSet[SlotStore] | None = None
    steps: StepCounts = field(default_factory=StepCounts)
    recorded: bool = False
    journal: Any = None
    cuts: Cuts | None = None
    unplayed: int = 0
    course: Course = field(default_factory=Course)

    def __post_init__(self) -> None:
        k, v = self.state.k, self.state.v
        with torch.inference_mode(False):
            self.bases = (k.new_full((1,), float("nan")), v.new_full((1,), float("nan")))
        self._is_new()

    def __setstate__(self, fields: dict[str, Any]) -> None:
        """A store that was unpickled is found by its own storages."""
        self.__dict__.update(fields)
        self.picked, self.lent, self.journal = [], None, None
        self._is_new()

    def __deepcopy__(self, memo: dict[int, Any]) -> SlotStore:
        """A store of its own with normal tensors, also under `torch.inference_mode()`: later calls change them in
        place. Its bases share the storages of the shells that are copied along.
        """
        other = object.__new__(SlotStore)
        memo[id(self)] = other
        fields = dict(vars(self))
        with torch.inference_mode(False), torch.no_grad():
            fields["state"] = self.state.clone()
            bases = copy.deepcopy(self.bases, memo)
            # an inference tensor's copy is one too if the shell was copied before: a view of its storage is not
            fields["bases"] = tuple(b.new_empty(0).set_(b.untyped_storage(), 0, b.shape, (1,)) for b in bases)
        other.__setstate__(fields)
        if self.journal is not None:
            other.journal = self.journal.of_copy(self.state, other.state)
        return other

    def base_of(self, half: int, elements: int) -> torch.Tensor:
        """The memory under the shell of K or V, of so many NaN."""
        if self.bases[half].numel() < elements:
            _BY_STORAGE.pop(_storage_key(self.bases[half]), None)  # its address will be another tensor's
            with torch.inference_mode(False):
                wide = self.bases[half].new_full((elements,), float("nan"))
            self.bases = (wide, self.bases[1]) if half == 0 else (self.bases[0], wide)
            self._register()
        return self.bases[half]

    def _is_new(self) -> None:
        """No call has left anything of it with the host yet."""
        self.versions, self.shown, self.held, self.sizes = [None, None], [None, None], [None, None], [None, None]
        self._register()

    def _register(self) -> None:
        _BY_STORAGE.update((_storage_key(base), self) for base in self.bases)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled by itself, without the shell that would find it again (`kvpass.runtime.pickled`).

        Raises:
            CacheError: always; `copy.deepcopy` does not come here.
        """
        raise unpicklable(self.name)

    @property
    def slots(self) -> int:
        """Capacity C: slots allocated per KV head."""
        return self.state.slots

    def live(self) -> torch.Tensor:
        """Slots in use, `[B, Hkv]` int32."""
        return self.state.cursor[..., LIVE]

    def evicted(self) -> int:
        """Keys that are gone: valid tokens seen and no longer live, summed over rows and KV heads."""
        return int((self.state.cursor[..., SEEN] - self.live()).sum())

    def make_room(self, new: int, step: bool) -> None:
        """Grow the slots, if needed, for a call of `new` tokens, which is a step or not. Copies this one layer, once in
        about n/40 kept tokens; where layers share out also before each call of several tokens.
        """
        if self.lent is not None:
            self.owned()
        if self.picked:
            self.picked = []
        tokens = self.tokens + new
        if not self.rule[ShareOut].share:
            rule = self.rule.of_steps if step else self.rule.of_call(self.tokens)
            used = kept(rule, tokens) if rule is self.rule else self.used + new
            if self.slots <= used:
                self.state = with_room(self.state, used, self._spare(used))
            if rule.demotes:
                whole = within(rule, tokens)
                self.state = with_room_beside(self.state, whole, self._spare(whole))
            self.used = used
            return
        with torch.inference_mode(False):
            if new > 1:
                self.state = evened(self.state, new)
            elif self.spare < 1:
                self.state, self.spare = with_spare(self.state, self._spare(kept(self.rule, tokens)))
        self.spare -= 1

    def _spare(self, used: int) -> int:
        """Free slots of a state that grows: more where each new size is recorded."""
        return max(LEAST_ROOM if self.recorded else 1, spare_slots(used))

    def evict_deferred(self) -> None:
        """Drop what steps, the last of which is not counted yet, left above the budget (`Timing.every`)."""
        from kvpass.kernels.after_call.deferred import evicted

        with torch.inference_mode(False), torch.no_grad():
            left = evicted(self.state, self.rule)
            self.state = in_place(self.state, left) if self.recorded else left
        self.used, self.waiting = kept(self.rule, self.tokens + 1), 0

    def give_back(self, tokens: int) -> None:
        """Free the slots that were needed until a call of several tokens was over, which makes `tokens` of them all."""
        self.used = kept(self.rule, tokens)
        slots = self.used + spare_slots(self.used)
        if not self.rule[ShareOut].share and self.slots > slots:
            with torch.inference_mode(False):
                self.state = with_slots(self.state, slots)

    @property
    def bytes(self) -> int:
        """Bytes of allocated K and V slots."""
        return self.state.bytes(entries=True)

    @property
    def overhead_bytes(self) -> int:
        """Bytes of everything else in the state: positions, statistics, cursor."""
        return self.state.bytes(entries=False)

    @property
    def dense_bytes(self) -> int:
        """Bytes that an unmodified cache holds: of the same logical length, or preallocated."""
        k, v = self.state.k, self.state.v
        tokens = self.tokens if self.length is None else self.length
        return sum(t.shape[0] * t.shape[1] * tokens * t.shape[3] * t.element_size() for t in (k, v))


def sharing_storage(tensor: torch.Tensor) -> SlotStore | None:
    """The living store whose base a tensor is a view of."""
    return _BY_STORAGE.get(_storage_key(tensor))


def same_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are views of the same memory."""
    return _storage_key(one) == _storage_key(other)


def version(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written to; None where torch does not count (made in inference mode)."""
    return None if tensor.is_inference() else tensor._version


def _storage_key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def unpicklable(where: str) -> CacheError:
    """Why a store, or what carries one but is no shell of a compiled model's, cannot leave its process."""
    return CacheError(
        "this part of a compressed cache cannot be pickled: a buffer of the caller's, or a cache of torch.compile",
        where=where,
        hint="copy.deepcopy(cache) keeps it within the process; a cache of kvpass.compile is pickled whole, and "
        "kvpass.Cache(cache).save(path) writes it to a file",
    )
