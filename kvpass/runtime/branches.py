"""Which shells still say what a store holds, once tokens of it were taken back: those that end before what was cut off.

A shell has a length but no data. Without this, one that ends with tokens that were taken back would be taken for as
many others that came in their place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SHELL = "_kvpass_shell"
"""Store and half (0 keys, 1 values) that a shell stands for."""

OF = "_kvpass_of"
"""The shell that a view was taken of, whose store lives as long as it does."""

MADE = "_kvpass_made_after"
"""How many cuts a shell was made after; not on those of before the first."""

MOST = 64
"""Cuts that are remembered; shells that are older than all of them are refused."""


@dataclass(frozen=True)
class Cuts:
    """When tokens of a store were taken back.

    Attributes:
        count: how often.
        lengths: the number of a cut, and how many tokens were left; only those behind which none left fewer.
        forgotten: the last cut that is not known any more.
    """

    count: int = 0
    lengths: tuple[tuple[int, int], ...] = ()
    forgotten: int = 0

    def after(self, length: int) -> Cuts:
        """One more, which leaves `length` tokens."""
        count = self.count + 1
        lengths = (*(one for one in self.lengths if one[1] < length), (count, length))
        forgotten = lengths[-MOST - 1][0] if len(lengths) > MOST else self.forgotten
        return Cuts(count, lengths[-MOST:], forgotten)

    def spare(self, shell: torch.Tensor, length: int) -> bool:
        """Whether all `length` tokens of a shell, or of a view of one, are still there. A view of an unknown shell is
        taken to be new.
        """
        of = shell
        while hasattr(of, OF):
            of = getattr(of, OF)
        made: int = getattr(of, MADE, 0 if hasattr(of, SHELL) else self.count)
        return made >= self.forgotten and all(length <= left for number, left in self.lengths if number > made)
