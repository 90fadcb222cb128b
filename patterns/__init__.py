"""The pattern room: declarative recognisers of attention cores and cache updates. Knows no policy and no kernel.

A core pattern has `name` and `match(node) -> Core | None`, an update pattern `name` and `match(node, flow) -> Update
| None`.
None means "not mine"; a `Miss` means "mine, but not supported", with the reason. Installed as `kvpass.patterns`, which
has all that a pattern of one's own needs (docs/patterns.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from kvpass.patterns.cache_blend import BlendUpdate
from kvpass.patterns.cache_buffer import BufferUpdate
from kvpass.patterns.cache_concat import ConcatUpdate
from kvpass.patterns.cache_returned import ReturnedUpdate
from kvpass.patterns.declined import BufferWrite, PartlyStored
from kvpass.patterns.flex import FlexAttention
from kvpass.patterns.latent import LatentAttention
from kvpass.patterns.memory import MemoryKeys
from kvpass.patterns.protocols import CorePattern, Expansion, RefusedPattern, UpdatePattern
from kvpass.patterns.sdpa import SdpaCore, check_operands, mask_terms
from kvpass.patterns.sdpa_aten import AtenSdpaCore
from kvpass.patterns.sliding_window import SlidingWindow
from kvpass.patterns.softmax import SoftmaxCore

from kvpass.errors import Reason
from kvpass.graph.calls import argument, call_name, operand
from kvpass.graph.dataflow import Flow
from kvpass.graph.miss import Miss
from kvpass.graph.shapes import shape_of
from kvpass.sites.site import Axes, Core, Term, Update
from kvpass.terms import CacheForm, MaskKind

__all__ = [
    "DEFAULT",
    "Axes",
    "CacheForm",
    "Core",
    "CorePattern",
    "Expansion",
    "Flow",
    "MaskKind",
    "Miss",
    "PatternSet",
    "Reason",
    "RefusedPattern",
    "Term",
    "Update",
    "UpdatePattern",
    "argument",
    "call_name",
    "check_operands",
    "mask_terms",
    "operand",
    "shape_of",
]


@dataclass(frozen=True)
class PatternSet:
    """The recognisers of a compilation. Of each kind, the first that takes a node has it.

    Attributes:
        cores: spellings of attention, tried on every node.
        updates: spellings of a cache update, tried on every node.
        returned: an update that is seen only by its value being read and returned; tried on values that a core reads.
        refused: caches that must stay dense; tried before `returned`, on the same values.
        expanded: tried on every core.
    """

    cores: tuple[CorePattern, ...]
    updates: tuple[UpdatePattern, ...]
    returned: UpdatePattern
    refused: tuple[RefusedPattern, ...] = ()
    expanded: tuple[Expansion, ...] = ()

    def refined(self, core: Core) -> Core:
        """A core over what is cached, if it reads what is made from that."""
        return next(filter(None, (pattern.match(core) for pattern in self.expanded)), core)

    def extended(
        self,
        cores: Iterable[CorePattern] = (),
        updates: Iterable[UpdatePattern] = (),
        refused: Iterable[RefusedPattern] = (),
        expanded: Iterable[Expansion] = (),
    ) -> PatternSet:
        """A set with more patterns, tried before those that it has.

        Two sets are equal if their patterns are. Make a pattern a frozen dataclass if it is made more than once:
        models compiled with equal sets share their graphs.
        """
        return replace(
            self,
            cores=(*cores, *self.cores),
            updates=(*updates, *self.updates),
            refused=(*refused, *self.refused),
            expanded=(*expanded, *self.expanded),
        )


DEFAULT = PatternSet(
    cores=(SdpaCore(), AtenSdpaCore(), SoftmaxCore(), FlexAttention()),
    updates=(ConcatUpdate(), BufferUpdate(), BlendUpdate()),
    returned=ReturnedUpdate(),
    refused=(SlidingWindow(), BufferWrite(), PartlyStored()),
    expanded=(LatentAttention(), MemoryKeys()),
)
