"""Slots that are shared out when a call is over."""

from __future__ import annotations

from dataclasses import dataclass

from kvpass.kernels.rank.criterion import INF
from kvpass.kernels.rule import Record, one_of


@dataclass(frozen=True)
class ShareOut(Record):
    """Slots that are shared out when a call is over, and all its keys are known (`kvpass.kernels.after_call.layers`).

    Attributes:
        share: `model`: among all layers and heads, by score; `preference`: among layers, by what their scorer prefers;
            `threshold`: each head keeps what scores at least `cut`, and the budget is a bound; `heads`: among the heads
            of each layer, as in the call itself where all of them are in one process; `even`: none, each head keeps its
            budget.
        cut: also what a step's token must score, or a slot goes.
    """

    share: str = ""
    cut: float = -INF

    def check(self) -> None:
        one_of(self, "share", "", "model", "preference", "threshold", "heads", "even")

    @property
    def evicts(self) -> bool:
        return self.cut > -INF

    @property
    def joins(self) -> bool:
        return self.share not in ("", "threshold", "even")

    def growing(self) -> ShareOut:
        return ShareOut(self.share)
