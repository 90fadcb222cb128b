"""How many slots a KV head may hold: one arithmetic for Python's ints and for int64 tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kvpass.kernels.rule import Record, Rule
from torch import Tensor


@dataclass(frozen=True)
class Budget(Record):
    """`slots`, a number of them; or, if that is 0, num / den of the valid tokens seen, at least `floor`."""

    slots: int = 0
    num: int = 1
    den: int = 1
    floor: int = 1

    @property
    def evicts(self) -> bool:
        return self.slots > 0 or self.num < self.den

    def growing(self) -> Budget:
        return Budget(floor=self.floor)

    def of(self, seen: Any) -> Any:
        """Slots after `seen` valid tokens: an int, or int64 of the shape of an int tensor."""
        if not isinstance(seen, Tensor):
            return self.slots or max(seen * self.num // self.den, self.floor)
        if self.slots:
            return torch.full_like(seen.long(), self.slots)
        return larger(part(seen, self.num, self.den), self.floor)


@dataclass(frozen=True)
class Apart(Record):
    """Slots' worth of bytes that a head holds beside its slots, in budgets of bytes."""

    apart: int = 0

    @property
    def evicts(self) -> bool:
        """Also where `Budget` is more than the tokens, as it may be of codes: only later there is room for all."""
        return self.apart > 0

    def growing(self) -> Apart:
        return Apart()

    def resized(self, size: Any, rule: Rule) -> Any:
        return larger(size - self.apart, rule[Budget].floor)


def budget(rule: Rule, seen: Any) -> Any:
    """Slots that each KV head may hold after `seen` valid tokens, int or int64 tensor as they are; where heads have
    budgets of their own, on average over them. Of a rule that demotes: tokens that it may hold whole.
    """
    resizing = rule.derived.get(budget)
    if resizing is None:
        resizing = rule.derived[budget] = [one for one in rule if type(one).resized is not Record.resized]
    size = rule[Budget].of(seen)
    for record in resizing:
        size = record.resized(size, rule)
    return size


def kept(rule: Rule, seen: int) -> int:
    """Slots in use after `seen` valid tokens."""
    return seen if rule.demotes else within(rule, seen)


def within(rule: Rule, seen: int) -> int:
    """Tokens that the budget keeps of `seen` valid ones: in slots, or whole if the others are demoted."""
    return min(seen, int(budget(rule, seen)))


def part(size: Any, num: int, den: int) -> Any:
    """floor(size * num / den) of an int >= 0, or of an int64 tensor of those."""
    if isinstance(size, Tensor):
        return torch.div(size.long() * num, den, rounding_mode="trunc")
    return size * num // den


def larger(one: Any, other: Any) -> Any:
    """The larger of both: ints, or tensors."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.maximum(one, other)
    if isinstance(other, Tensor):
        one, other = other, one
    return one.clamp(min=other) if isinstance(one, Tensor) else max(one, other)


def smaller(one: Any, other: Any) -> Any:
    """The smaller of both, likewise."""
    return -larger(-one, -other)
