"""Budgets that fall from layer to layer (PyramidKV, arXiv 2406.02069)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kvpass.kernels.attention.observation import Observation
from kvpass.kernels.budget import Budget, larger, part
from kvpass.kernels.rank.layer import Layer
from kvpass.kernels.rule import Record, Rule
from torch import Tensor


@dataclass(frozen=True)
class Pyramid(Record):
    """beta: how steep, the mean above the observation window by the smallest; 0: no pyramid."""

    beta: int = 0

    def growing(self) -> Pyramid:
        return Pyramid()

    def resized(self, size: Any, rule: Rule) -> Any:
        """Budgets fall from layer to layer by equal steps, the observation window on top, and together are no more than
        `size` for each layer.

        Ends as in Zefan-Cai/KVCache-Factory, rounded down in between. They follow from `size` alone, so that no layer's
        budget ever falls while tokens come, and a row's is no larger than that of a longer one (docs/design/0003). A
        share above a half is steep only as far as the first layer then keeps all that it has seen.
        """
        asked, at = rule[Budget], rule[Layer]
        base, fixed = size - rule[Observation].window, asked.slots > 0
        narrow = base < (self.beta if fixed else 1)
        if at.layers < 2 or (not isinstance(size, Tensor) and narrow):
            return size
        flat = 0 if fixed else part(base, 2 * asked.num - asked.den, asked.num)
        low = larger(larger(part(base, 1, self.beta), flat), 1)
        high, steps = 2 * base - low, at.layers - 1
        sized = size - base + part(low * at.layer + high * (steps - at.layer), 1, steps)
        return torch.where(narrow, size, sized) if isinstance(size, Tensor) else sized
