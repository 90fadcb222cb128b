"""When evictions happen."""

from __future__ import annotations

from dataclasses import dataclass

from kvpass.kernels.rule import Record, one_of


@dataclass(frozen=True)
class Timing(Record):
    """When evictions happen.

    Attributes:
        when: `always`; `calls`: of several tokens, never in steps; `first`: in the first such call only.
        every: steps after which what they left above the budget goes at once.
        shortest: a row's tokens that go on from others, and are fewer, say a question, are as if they had come in
            steps: no scorer looks at them, nothing is replayed, scores stay.
    """

    when: str = "always"
    every: int = 1
    shortest: int = 1

    def check(self) -> None:
        one_of(self, "when", "always", "calls", "first")

    def acts(self, position: int | None) -> bool:
        if position is None:
            return self.when == "always" and self.every == 1
        return self.when != "first" or position == 0
