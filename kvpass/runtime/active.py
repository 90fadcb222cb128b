"""Which call of a compiled model is under way in this thread, and what its graphs say of themselves."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvpass.runtime.host_state import Snapshot

if TYPE_CHECKING:
    import torch

    from kvpass.runtime.store import SlotStore


@dataclass
class Ledger:
    """One outermost call, as far as the graphs that run in it write to it.

    Attributes:
        owner: whose call it is; `whole`: of the model itself, and not of a module in it.
        before: attributes of the model when the first graph of this call was compiled; None if none was.
        graphs: compiled graphs that ran in it.
        opened: stores that they continued or began.
        made: the tensors that stand for stores after it.
        dense: caches that are left as they are by choice, which its graphs returned.
        hosted: shells that only the model itself held after earlier calls.
        breaks: how many graph breaks Dynamo had told of when it began.
        parted: memories that graphs without a site write new tokens into, how many, and the model's line.
    """

    owner: Any
    whole: bool
    hosted: list[weakref.ref[torch.Tensor]]
    before: Any = None
    breaks: int = 0
    parted: list[tuple[int, int, str]] = field(default_factory=list)
    graphs: int = 0
    opened: list[SlotStore] = field(default_factory=list)
    made: list[torch.Tensor] = field(default_factory=list)
    dense: list[torch.Tensor] = field(default_factory=list)

    def compiling(self) -> None:
        """A graph of this call is about to be compiled: nothing of it has run yet."""
        if self.before is None:
            self.before = Snapshot(self.owner.model)

    def ran(self, stores: Sequence[SlotStore] = (), shells: Sequence[torch.Tensor] = (), dense: Any = ()) -> None:
        """A graph has run: the stores that it continued, what stands for them now, and caches dense by choice."""
        self.graphs += 1
        self.opened += stores
        self.made += shells
        self.dense += dense


class Active(threading.local):
    """Calls under way, the innermost last."""

    def __init__(self) -> None:
        self.calls: list[Ledger] = []


ACTIVE = Active()


def current() -> Ledger | None:
    """The call of a compiled model that is under way in this thread."""
    return ACTIVE.calls[-1] if ACTIVE.calls else None
