"""What a rule says of slots that go, and the fields of the state that follow from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from kvpass.kernels.rule import Record, Rule, one_of
from kvpass.kernels.slots.bias import BIAS_FIELD
from kvpass.kernels.slots.state import Field

NEAREST_KEY, NEAREST_POSITION, NEXT, RUN, ONE_SLOT = "nearest_key", "nearest_position", "next", "run", "one_slot"
TARGETS = (NEAREST_KEY, NEAREST_POSITION, NEXT, RUN, ONE_SLOT)
HALVES = ("values", "both")
WEIGHTS = ("even", "cosine", "cosine_norm", "gaussian")
MEANS = ("weights", "count", "none")
GATES = ("none", "moving", "chance")
MOMENTS = ("always", "steps", "calls")
BIASES = ("none", "count")

BAR = "merge_bar"
"""Field of a `moving` gate: what a cosine must reach, of each head."""

NO_BAR = -2.0
"""Before anything went: below every cosine."""

MERGED = "merged"
"""Field of the `one_slot`: how many tokens are in it beside its own, of each head."""


@dataclass(frozen=True)
class Merge(Record):
    """Slots that go are merged into others.

    Attributes:
        merge_into: of `TARGETS`, or empty: they are dropped.
        merge_halves: `values`, or `both` keys and values.
        merge_weight: of what comes in, where a target has 1 itself; of `WEIGHTS`.
        merge_mean: what sums are divided by: their `weights`, the `count` of what went in and the target, or `none`.
        merge_gate: of `GATES`.
        merge_least: cosine of both keys below which nothing is merged.
        merge_count: targets of `next`.
        merge_sigma: of `gaussian`.
        merge_at: the calls in which: `always`, `steps` or `calls` of several tokens.
        merge_bias: of `BIASES`: the logarithm of the `count` of tokens that `one_slot` stands for, its own too, is
            added to its logit.
    """

    merge_into: str = ""
    merge_halves: str = "values"
    merge_weight: str = "cosine_norm"
    merge_mean: str = "weights"
    merge_gate: str = "none"
    merge_least: float = -1.0
    merge_count: int = 1
    merge_sigma: float = 1.0
    merge_at: str = "always"
    merge_bias: str = "none"

    def check(self) -> None:
        for word, known in (
            ("merge_into", ("", *TARGETS)),
            ("merge_halves", HALVES),
            ("merge_weight", WEIGHTS),
            ("merge_mean", MEANS),
            ("merge_gate", GATES),
            ("merge_at", MOMENTS),
            ("merge_bias", BIASES),
        ):
            one_of(self, word, *known)

    def work(self, rule: Rule) -> Iterator[str]:
        if self.calls and self.merge_into == NEAREST_KEY:
            yield "n*T cosines"

    @property
    def joins(self) -> bool:
        return self.merge_gate in ("moving", "chance")

    @property
    def slot_bytes(self) -> int:
        return 4 if self.counts else 0

    @property
    def counts(self) -> bool:
        """Whether the one slot weighs as much as the tokens in it."""
        return self.merge_bias == "count"

    @property
    def calls(self) -> bool:
        """Whether calls of several tokens merge."""
        return bool(self.merge_into) and self.merge_at != "steps"

    @property
    def steps(self) -> bool:
        """Whether steps do."""
        return bool(self.merge_into) and self.merge_at != "calls"

    @property
    def halves(self) -> tuple[str, ...]:
        """The state's fields that are merged."""
        return ("k", "v") if self.merge_halves == "both" else ("v",)

    @property
    def state_fields(self) -> tuple[Field, ...]:
        found = [Field(BAR, "BH", torch.float32, NO_BAR)] if self.merge_gate == "moving" else []
        if self.merge_into == ONE_SLOT:
            found.append(Field(MERGED, "BH", torch.float32, 0.0))
        if self.counts:
            found.append(BIAS_FIELD)
        return tuple(found)
