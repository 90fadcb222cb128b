"""Stores that share one state until one of them is about to change it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self
from weakref import WeakSet

import torch

from kvpass.kernels.slots.state import State


class Lending(ABC):
    """The part of a `SlotStore` that makes others of it.

    Attributes:
        state, bases: of the store.
        lent: the living stores that share its state, itself among them; None if none does.
        journal: of its tentative tokens, which are settled in a fork.
    """

    state: State
    bases: tuple[torch.Tensor, torch.Tensor]
    lent: WeakSet[Any] | None
    journal: Any

    @abstractmethod
    def __setstate__(self, fields: dict[str, Any]) -> None:
        """Take these fields, and be found by the bases among them."""

    def with_state(self, state: State, **changes: Any) -> Self:
        """Another store with a state of other rows, of this one's history: `changes` to its fields."""
        other = object.__new__(type(self))
        with torch.inference_mode(False):
            bases = tuple(base.new_full((1,), float("nan")) for base in self.bases)
        other.__setstate__({**vars(self), **changes, "state": state, "bases": bases})
        return other

    def fork(self) -> Self:
        """Another store with this one's state: both have it until one is about to change it."""
        other = self.with_state(self.state)
        self.lent = other.lent = self.lent or WeakSet([self])
        self.lent.add(other)
        return other

    def owned(self) -> Self:
        """This store, with a state that no other has: a copy, unless it is the last that has it."""
        lent = self.lent
        if lent is not None:
            if len(lent) > 1:
                with torch.inference_mode(False), torch.no_grad():
                    shared, self.state = self.state, self.state.clone()
                if self.journal is not None:
                    self.journal = self.journal.of_copy(shared, self.state)
            lent.discard(self)
            self.lent = None
        return self
