"""The recordings of one compiled model: how many, in which memory, and what became of its steps."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch

from kvpass.runtime.graph_device import GraphDevice, Pool, Recording, Run

MOST = 16
"""Recordings that are kept, the last used ones."""

TRIES = 3
"""How often memory may be exhausted before nothing is recorded any more."""


class StepCounts(NamedTuple):
    """What became of the steps of a cache under `mode="reduce-overhead"`.

    Attributes:
        captures: graphs that were recorded, each in the step that replayed it first.
        replays: steps that were replayed.
        eager: steps that were launched one kernel after the other.
        why: why the last of those was.
    """

    captures: int = 0
    replays: int = 0
    eager: int = 0
    why: str = ""

    def replayed(self, recorded: bool) -> StepCounts:
        """One more step that was replayed, and recorded for it."""
        return self._replace(captures=self.captures + recorded, replays=self.replays + 1)

    def launched(self, why: str) -> StepCounts:
        """One more step that was not."""
        return self._replace(eager=self.eager + 1, why=why)


class Failure(NamedTuple):
    """Why a step was not recorded, and whether to try another time."""

    why: str
    again: bool


class Recordings:
    """Shared by all graphs of one backend. Whoever records or replays holds the lock, from filling the inputs until the
    outputs are copied.
    """

    def __init__(self, device: GraphDevice, most: int = MOST) -> None:
        self.device, self.most = device, most
        self.lock = threading.RLock()
        self.kept: OrderedDict[Hashable, Any] = OrderedDict()
        self.pools: dict[torch.device, Pool] = {}
        self.exhausted = 0

    def find(self, key: Hashable) -> Any:
        """What was kept under a key, which is now the last used; None if nothing was."""
        if key in self.kept:
            self.kept.move_to_end(key)
        return self.kept.get(key)

    def keep(self, key: Hashable, value: Any) -> None:
        """Keep something; the least lately used goes."""
        self.kept[key] = value
        self.kept.move_to_end(key)
        while len(self.kept) > self.most:
            self.kept.popitem(last=False)

    def drop(self, owner: Any = None) -> None:
        """Forget what an owner, the first part of its keys, has kept; None: everybody."""
        for key in [key for key in self.kept if owner is None or key[0] == owner]:  # type: ignore[index]  # tuples
            del self.kept[key]

    def record(self, device: torch.device, run: Run, inputs: Sequence[Any]) -> Recording | Failure:
        """A recording; or why there is none. Nothing has run.

        Warns:
            RuntimeWarning: memory was exhausted. All recordings are given back.
        """
        if device not in self.pools:
            self.pools[device] = self.device.pool(device)
        try:
            return self.pools[device].record(run, inputs)
        except torch.OutOfMemoryError:
            self.drop()
            self.exhausted += 1
            why = "memory was exhausted while a step was recorded"
            warnings.warn(f"kvpass: {why}; it runs without a CUDA graph", RuntimeWarning, stacklevel=2)
            return Failure(why, self.exhausted < TRIES)
        except RuntimeError as error:
            return Failure(f"it cannot be recorded: {str(error).strip().splitlines()[0]}", False)
