"""What happens to one site of a graph, and what its rule reads of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from kvpass.graph.angles import positions_of
from kvpass.graph.calls import call_name, example, operand
from kvpass.graph.miss import Miss
from kvpass.graph.output_projection import OutputProjection, output_projection
from kvpass.graph.projections import block_input
from kvpass.graph.rope import Rotation, rotation, unrounded
from kvpass.kernels.after_call.reindex import Reindex
from kvpass.kernels.codecs.storage import coded, fit_fields
from kvpass.kernels.exits.record import Merge
from kvpass.kernels.exits.refit import Refit
from kvpass.kernels.rank.replay import Replay
from kvpass.kernels.rank.scored import Scoring
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rank.weights import Weight
from kvpass.kernels.rule import Rule
from kvpass.sites.site import Site
from kvpass.terms import Layout, Phase

OPS = {
    Phase.PREFILL: ("prefill_attend", "score_slots", "select_slots", "compact_slots"),
    Phase.EXTEND: ("join_slots", "prefill_attend", "score_slots", "select_slots", "compact_slots"),
    Phase.DECODE: ("decode_attend",),
}
"""The ops that replace a site, in order."""


@dataclass(frozen=True)
class SitePlan:
    """What happens to one site: `rule` says what its ops observe and how they choose."""

    site: Site
    rule: Rule

    @property
    def ops(self) -> tuple[str, ...]:
        """Names of the ops that replace the site, in order."""
        ops = list(OPS[self.site.phase])
        if self.windowed and self.site.phase is not Phase.DECODE:
            ops.insert(ops.index("score_slots"), "window_rows")
        if self.replays:
            ops.insert(ops.index("score_slots"), "replay_scores")
        if self.merges and self.site.phase is not Phase.DECODE:
            ops += ["merge_slots"]
        if self.refits and self.site.phase is not Phase.DECODE:
            ops += ["refit_slots"]
        if coded(self.rule) and self.site.phase is not Phase.DECODE:
            ops += ["choose_whole" if self.rule.demotes else "keep_whole"]
            if fit_fields(self.rule):
                behind = ops.index("prefill_attend") + 1
                ops[behind:behind] = ["fit_slots", "encode_fitted"]
            elif self.site.phase is Phase.PREFILL:
                ops.insert(0, "encode_slots")
        return ("arrivals", *ops) if self.arrives and self.site.phase is Phase.DECODE else tuple(ops)

    @cached_property
    def projection(self) -> OutputProjection | None:
        """Where the rule's value weight, or its replay, finds the output projection; None if it reads none."""
        core, dims = self.site.core, self.site.dims
        if not self.projected or core.tiled:
            return None
        return output_projection(core.node, int(dims["Hq"]), int(dims["Dv"]))

    @cached_property
    def hidden(self) -> fx.Node | None:
        """The hidden states that the rule's scorer, or its replay, reads; None if it reads none."""
        read = "hidden" in self.rule[Scoring].reads or self.rule[Replay].normed
        return block_input(self.site.value.update.new) if read else None

    @cached_property
    def rotation(self) -> Rotation | None:
        """The rotation of the queries, for a scorer that reads them before it; None if it reads none."""
        core = self.site.core
        plain = core.axes.q == "BHSD" and not core.tiled
        return rotation(core.q) if "queries" in self.rule[Scoring].reads and plain else None

    @cached_property
    def key_rotation(self) -> Rotation | None:
        """The rotation of the new keys, for a rule that turns them again; None if it does not."""
        half = self.site.key
        new: Any = half.update.new
        if half.layout == Layout.BTHD:
            new = operand(new) if call_name(new) == "transpose" else None
        found = rotation(new) if self.rule[Reindex].reindex and isinstance(new, fx.Node) else None
        # angles of half precision are too coarse to tell one position from the next
        return found if found is None or example(unrounded(found.cos)).dtype is torch.float32 else None

    @cached_property
    def key_positions(self) -> tuple[list[fx.Node], bool] | None:
        """Nodes that may be the positions that new keys are rotated by, and whether they are looked up in a table; None
        if the angles cannot be computed from the graph's inputs: they depend on what the graph itself changes.
        """
        if self.key_rotation is None:
            return None
        try:
            return positions_of(self.key_rotation, self.site.dims["S"])
        except Miss:
            return None

    @property
    def windowed(self) -> bool:
        """Whether the scorer reads the rows of the observation window."""
        return self.rule[Scoring].windowed

    @property
    def merges(self) -> bool:
        """Whether calls of several tokens merge what they evict, inside the graph."""
        return self.rule[Merge].calls and not self.rule[ShareOut].share

    @property
    def refits(self) -> bool:
        """Whether calls of several tokens fit what stays."""
        return self.rule[Refit].refit_queries > 0

    @property
    def projected(self) -> bool:
        """Whether the rule reads the output projection."""
        return self.rule[Weight].projected or self.rule[Replay].normed

    @property
    def replays(self) -> bool:
        """Whether calls may repeat tokens that slots hold, which get scores by it."""
        return self.rule[Replay].replay > 0 and self.site.phase is Phase.EXTEND

    @property
    def arrives(self) -> bool:
        """Whether a generated token's slot starts with more than zeros."""
        return any(record.arrives for record in self.rule)
