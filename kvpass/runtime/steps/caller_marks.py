"""What the caller says of a call's tokens (`kvpass.marked`): an input of the graph, and a check of what is read."""

from __future__ import annotations

from typing import Any

import torch

from kvpass.kernels.rank.marks import Marks
from kvpass.kernels.rule import Rule
from kvpass.runtime.marks import check_read, marks_of
from kvpass.runtime.step import CallFacts, Moment, SharedInput, Step
from kvpass.terms import CacheForm, Phase


class MarksInput(SharedInput):
    """int32 [B, S], 0 where nothing was said."""

    name, axes = "marks", ("B", "S")

    def applies(self, rule: Rule, phase: Phase, form: CacheForm) -> bool:
        return rule[Marks].marked

    def value(self, call: CallFacts) -> torch.Tensor:
        """Raises:
        CacheError: the marks are for another batch, or drop the only token of the call.
        """
        first = call.bindings[0]
        return marks_of(first.sizes["B"](call.args), call.new, call.stores[0].tokens, first.device)


MARKS = MarksInput()


class CheckMarks(Step):
    """Refuses a call whose policy does not read what the caller marked, whatever its rules are.

    Attributes:
        reads: of `keep`, `spans` and `drop`, by any layer of the policy (`Policy.marks`).
    """

    name, moment = "check_marks", Moment.CHECK

    def __init__(self, reads: tuple[str, ...] = ()) -> None:
        self.reads = reads
        known = f" other than {', '.join(reads)}" if reads else ""
        self.about = f"marks of the caller{known} are refused"

    def applies(self, rule: Rule, phase: Phase) -> bool:
        return True

    def run(self, call: CallFacts) -> None:
        """Raises:
        CacheError: naming the kind of marks and what would read it.
        """
        check_read(self.reads, call.where)

    def under(self, policy: Any) -> CheckMarks:
        return CheckMarks(policy.marks)
