"""Tokens that the caller marked: which must stay, which go when their call is over, and the span that each is of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kvpass.kernels.errors import MarkError
from kvpass.kernels.rule import Record, Rule
from kvpass.kernels.slots.statistics import brought, stat
from torch import Tensor

MARK = brought("mark")
"""A slot's statistic that the caller gave with its token: the number of its span, plus `KEEP` or `DROP`."""

KEEP, DROP = 1 << 20, 1 << 21
"""Added to the mark of a token that must stay, or that must go when its call is over. Above every span's number; sums
are exact in float32.
"""


@dataclass(frozen=True)
class Marks(Record):
    """Whether slots keep the caller's marks."""

    marked: bool = False


def must_stay(stats: Tensor, rule: Rule) -> Tensor:
    """Slots that the caller said to keep: bool [B, Hkv, C]."""
    return stats[stat(rule, MARK)] >= KEEP


def marks_of_keys(marks: Tensor | None, past: Tensor | None, candidate: Tensor, rule: Rule) -> Tensor:
    """Of slots and a call's tokens: float32 [B, Hkv, L]. marks int32 [B, S] of the call, past: what slots kept."""
    out = torch.zeros_like(candidate, dtype=torch.float32)
    if past is not None:
        out.copy_(past[stat(rule, MARK)])
    if marks is not None:
        out[..., out.shape[-1] - marks.shape[1] :] = marks[:, None].float()
    return out


def check_marks(wanted: Tensor, size: Tensor) -> None:
    """Raises MarkError if more tokens must stay than there is room for; on a GPU the device asserts it."""
    counts = wanted.sum(-1, keepdim=True)
    good = (counts <= size).all()
    if good.device.type != "cpu":
        torch._assert_async(good, "more tokens are marked to be kept than the budget holds")
    elif not bool(good):
        raise MarkError(
            f"{int(counts.max())} tokens are marked to be kept, but the budget holds {int(size.min())}",
            "mark fewer tokens, or raise the budget",
        )
