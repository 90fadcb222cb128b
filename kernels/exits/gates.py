"""Whether a slot that goes is merged at all."""

from __future__ import annotations

import torch
from kvpass.kernels.exits.record import NO_BAR
from kvpass.kernels.rank.layer import Layer
from kvpass.kernels.rank.scored import Scoring
from kvpass.kernels.rank.scorers.chance import drawn
from kvpass.kernels.rule import Rule
from torch import Tensor

SALT = 31
"""Apart from other draws of the same seed."""


def moved(bar: Tensor, alike: Tensor) -> Tensor:
    """A moving bar after slots whose mean cosine was `alike` went, any shape: that mean at first, then the mean of both
    (D2O, arXiv 2406.13035).
    """
    return torch.where(bar == NO_BAR, alike, 0.5 * bar + 0.5 * alike)


def lucky(gone: Tensor, kept: Tensor, place: Tensor, head: Tensor | int, rule: Rule) -> Tensor:
    """Whether chance merges slots, with probability gone / kept: bool (CaM, ICML 2024). The same for the same seed,
    layer, head and place.

    gone, kept: float32, the attention that a slot got so far, and the mean of its targets, 0 / 0 is 0; place: int, of
    the slot among its row's tokens; head: int, or int64 that broadcasts.
    """
    chance = torch.where(gone > 0, gone / kept, 0.0)
    return drawn(place.long(), head, rule[Layer].layer, rule[Scoring].seed + SALT) < chance
