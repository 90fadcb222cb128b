"""Which layer of the rewritten ones a rule is for, where that matters: pyramids, tables of heads, some scorers."""

from __future__ import annotations

from dataclasses import dataclass

from kvpass.kernels.rule import Record


@dataclass(frozen=True)
class Layer(Record):
    """Number `layer` of so many `layers`."""

    layer: int = 0
    layers: int = 1
