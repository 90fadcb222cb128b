"""What the plan puts around a compiled call: steps before and after it, and inputs that all sites share.

A feature is a file in `kvpass/runtime/steps/`; `kvpass/runtime/steps/__init__.py` says in which order they run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch

from kvpass.kernels.rule import Rule
from kvpass.runtime.binding import Binding
from kvpass.runtime.store import SlotStore
from kvpass.terms import CacheForm, Phase


@dataclass(frozen=True)
class CallFacts:
    """One call of a compiled graph, or the sites of it that a step is about.

    Attributes:
        args: the original graph's inputs.
        bindings: of the sites, in order.
        new: tokens of the call, padding included.
        where: names the graph's sites in errors.
        stores: of the sites; `tokens` do not count this call's yet. None of them while a call is checked.
        positions: where each site's tokens are written into its buffer, 0 for caches that grow; likewise.
    """

    args: Sequence[Any]
    bindings: tuple[Binding, ...]
    new: int
    where: str
    stores: tuple[SlotStore, ...] = ()
    positions: tuple[int, ...] = ()

    @property
    def sites(self) -> list[tuple[Binding, SlotStore]]:
        """Each site's binding with its store."""
        return list(zip(self.bindings, self.stores, strict=True))

    @property
    def phase(self) -> Phase:
        """That of the first site."""
        return self.bindings[0].phase

    def of(self, sites: Sequence[int]) -> CallFacts:
        """The same call, with these of its sites only."""
        if len(sites) == len(self.bindings):
            return self
        bindings = tuple(self.bindings[at] for at in sites)
        stores = tuple(self.stores[at] for at in sites) if self.stores else ()
        positions = tuple(self.positions[at] for at in sites) if self.positions else ()
        return replace(self, bindings=bindings, stores=stores, positions=positions)


class Moment(Enum):
    """When a step runs, in words of the plan's text.

    `CHECK` may refuse a call and changes nothing: it runs before caches are looked at, and gets no stores. `BEFORE` and
    `AFTER` run next to the compiled call, under no_grad and outside of inference mode; if they fail, the call's stores
    are spoiled, and a `DataError` becomes an error of kvpass that says where.
    """

    CHECK = "before caches are opened"
    BEFORE = "before a call"
    AFTER = "after a call"


class Step(ABC):
    """Something done outside of the compiled graph.

    Attributes:
        name: in the plan, e.g. `turn_keys`.
        about: what it does, for readers of the plan.
        moment: when it runs.
    """

    name: str
    about: str
    moment: Moment

    @abstractmethod
    def applies(self, rule: Rule, phase: Phase) -> bool:
        """Whether it is about a site with this rule in a graph of this phase."""

    @abstractmethod
    def run(self, call: CallFacts) -> None:
        """Do it, for a call with the sites that it applies to. What changes slots counts it in `SlotStore.outside`."""

    def under(self, policy: Any) -> Step:
        """The step as it is under a checked `Policy`: itself, where the policy's rules say all."""
        return self


@dataclass(frozen=True)
class PlannedStep:
    """A step of a graph's plan, and the places of the sites that it is about."""

    step: Step
    sites: tuple[int, ...]


class SharedInput(ABC):
    """An input of the rewritten graph that all sites share, after their state.

    Attributes:
        name: of the input, after `kvpass_`.
        axes: letters of its sizes, those of a site (`Site.dims`), or digits; None for a number that no graph is
            compiled for.
        dtype: of a tensor.
    """

    name: str
    axes: tuple[str, ...] | None = None
    dtype: torch.dtype = torch.int32

    @abstractmethod
    def applies(self, rule: Rule, phase: Phase, form: CacheForm) -> bool:
        """Whether a site with this rule and form of cache reads it in a graph of this phase."""

    @abstractmethod
    def value(self, call: CallFacts) -> Any:
        """What a call hands to the graph: an int, or a tensor on the device of the first site.

        call: with all sites, their stores open.
        """
