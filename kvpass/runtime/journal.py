"""What a store was before each of its last tokens, so that they can be taken back bit for bit (docs/design/0017).

A step writes its token into one slot, and may change every position, statistic and cursor. So before a step those are
copied, and of keys, values and codes the one slot; all of the state under the few rules whose steps change more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from kvpass.kernels.after_call.undoing import moves_entries
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import FREE
from kvpass.kernels.slots.ragged import starts
from kvpass.kernels.slots.state import Field, State, flat
from kvpass.kernels.timing import Timing

if TYPE_CHECKING:
    from kvpass.runtime.store import SlotStore

FACTS = ("tokens", "used", "waiting", "spare", "calls", "outside", "step", "zero")
"""What a call changes of a store beside its state."""


@dataclass(frozen=True)
class Entry:
    """A store before one token.

    Attributes:
        facts: by name, of `FACTS`.
        state: the object that it had; steps change its tensors in place, growing leaves it alone.
        whole: copies of fields.
        rows: int64 [B * Hkv], the slot of each head in the flattened memory that the step is to write.
        slots: of other fields, copies of what was there.
    """

    facts: dict[str, Any]
    state: State
    whole: dict[str, torch.Tensor]
    rows: torch.Tensor
    slots: dict[str, torch.Tensor]

    @classmethod
    def of(cls, store: SlotStore) -> Entry:
        """A store before a call of one token, and before it grows for it."""
        state, everything = store.state, changes_everything(store.rule, store.recorded)
        with torch.inference_mode(False), torch.no_grad():
            cursor, places = state.cursor, state.cursor[..., 0].numel() * state.slots
            # a state without room has no such slot: another takes its place, and this one stays as it is
            rows = (starts(cursor, state.slots) + cursor[..., FREE]).flatten().clamp(max=places - 1)
            whole, slots = {}, {}
            for field in state.fields:
                tensor = state[field.name]
                if everything or _changes(field):
                    whole[field.name] = tensor.clone()
                elif field.per_slot and tensor.numel():
                    slots[field.name] = flat(field, tensor).index_select(field.rows, rows)
        return cls({name: getattr(store, name) for name in FACTS}, state, whole, rows, slots)

    def restore(self, store: SlotStore) -> None:
        """Make the store what it was; all later entries have been restored. In place: the state's addresses stay."""
        with torch.inference_mode(False), torch.no_grad():
            for name, copied in self.whole.items():
                self.state[name].copy_(copied)
            for field, tensor in self.state.per_slot():
                if field.name in self.slots:
                    flat(field, tensor).index_copy_(field.rows, self.rows, self.slots[field.name])
        store.state = self.state
        for name, value in self.facts.items():
            setattr(store, name, value)

    @property
    def bytes(self) -> int:
        """Of the copies."""
        copies = (*self.whole.values(), self.rows, *self.slots.values())
        return sum(t.numel() * t.element_size() for t in copies)


def changes_everything(rule: Rule, recorded: bool) -> bool:
    """Whether a step may change keys, values or codes elsewhere than in its token's slot: of slots that others are
    merged into or that are turned to other places; or because evictions that waited leave the addresses as they are.
    """
    return moves_entries(rule) or (rule[Timing].every > 1 and recorded)


def _changes(field: Field) -> bool:
    """Whether a step may change all of a field. Of keys, values and codes only whole copies beside the slots, which
    come and go; fits are made by calls of several tokens.
    """
    return not field.entries or "W" in field.dims


class Journal:
    """The last tokens of one store that can be taken back, the oldest first.

    Args:
        entries: the store before each of them.
    """

    def __init__(self, entries: Sequence[Entry] = ()) -> None:
        self.entries = list(entries)

    def note(self, store: SlotStore, depth: int) -> None:
        """A token is about to come; `depth` of them, this one included, stay tentative."""
        self._forget_failed(store.tokens)
        if not self._leads_to(store.tokens):
            self.entries.clear()
        self.entries.append(Entry.of(store))
        del self.entries[:-depth]

    def take_back(self, store: SlotStore, length: int) -> bool:
        """Make the store what it was after its first `length` tokens; False if that is too long ago."""
        self._forget_failed(store.tokens)
        if not self._leads_to(store.tokens) or length < self.entries[0].facts["tokens"]:
            return False
        while self.entries and self.entries[-1].facts["tokens"] >= length:
            self.entries.pop().restore(store)
        return True

    def _forget_failed(self, tokens: int) -> None:
        """Drop what was noted for a call that failed before it changed anything."""
        while self.entries and self.entries[-1].facts["tokens"] >= tokens:
            self.entries.pop()

    def _leads_to(self, tokens: int) -> bool:
        """Whether nothing came after the last of them."""
        return bool(self.entries) and self.entries[-1].facts["tokens"] + 1 == tokens

    def of_copy(self, old: State, new: State) -> Journal:
        """That of a copied store, whose state is `new` in the place of `old`. Nobody changes copies of fields: both
        have them.
        """
        states = {id(old): new}
        for entry in self.entries:
            if id(entry.state) not in states:
                states[id(entry.state)] = entry.state.clone()
        return Journal([replace(entry, state=states[id(entry.state)]) for entry in self.entries])

    @property
    def bytes(self) -> int:
        """What it holds beside the state."""
        return sum(entry.bytes for entry in self.entries)
