"""Which of its row's valid tokens a key is: what windows, sinks, granules and neighbours count by. Pure torch.

A slot's position is its column in the sequence, padding included. Where padding lies between a row's tokens (turns of
unequal length, right padding), columns say nothing of how many tokens are between two of them (docs/design/0003).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kvpass.kernels.budget import part
from kvpass.kernels.rule import Record, Rule
from kvpass.kernels.slots.cursor import FIRST, SEEN
from kvpass.kernels.slots.statistics import Statistics, brought, stat
from torch import Tensor

PLACE = brought("place")
"""A slot's statistic: which of its row's valid tokens it is, or where its key was turned to since
(`kvpass.kernels.after_call.reindex`).
"""

NUMBER = brought("number")
"""A slot's statistic: which of its row's valid tokens it is, from 0, where more than the newest ones' order decides."""


@dataclass(frozen=True)
class Protected(Record):
    """The first `sinks` tokens of a row, and the last `recent` + budget * recent_num / recent_den, never go."""

    sinks: int = 0
    recent: int = 0
    recent_num: int = 0
    recent_den: int = 1

    def window(self, size: Any) -> Any:
        """Recent tokens that are protected under a budget of `size` slots, an int or an int64 tensor."""
        return self.recent + part(size, self.recent_num, self.recent_den)


def new_places(valid: Tensor, cursor: Tensor) -> Tensor:
    """Of a call's tokens: int32 [B, 1, S], -1 for padding. valid bool [B, S]; cursor before the call."""
    count = valid.cumsum(-1, dtype=torch.int32) - 1
    return torch.where(valid, count + cursor[:, :1, SEEN], -1)[:, None]


def slot_places(pos: Tensor, cursor: Tensor, stats: Tensor | None, rule: Rule) -> Tensor:
    """Of slots in the order of positions: int32 [B, Hkv, C], -1 where empty.

    pos int32 [B, Hkv, C], stats float32 [N, B, Hkv, C]. Exact where the rule keeps the number, and in rows without
    padding after their first token. Else it takes padding to lie as late as it can: exact for the newest tokens as long
    as none of them has gone, so for a window that was always protected.
    """
    used = pos >= 0
    if stats is not None and NUMBER in rule[Statistics].stats:
        return torch.where(used, stats[stat(rule, NUMBER)].int(), -1)
    later = used.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1) - 1  # slots in use behind
    seen = cursor[..., SEEN, None]
    bound = torch.where(used, pos - cursor[..., FIRST, None] + later, seen - 1)
    bound = torch.minimum(bound.flip(-1).cummin(-1).values.flip(-1), seen - 1)
    return torch.where(used, bound - later, -1)


def key_places(
    pos: Tensor | None,
    valid: Tensor,
    cursor: Tensor,
    past_stats: Tensor | None,
    shape: tuple[int, int, int],
    rule: Rule,
) -> Tensor:
    """Of the keys of a call of several tokens: int32 [B, Hkv, L], -1 for padding and empties. Arguments as for
    `score_slots`; shape: B, Hkv, L.
    """
    new = new_places(valid, cursor).expand(*shape[:2], -1)
    if pos is None:
        return new
    old = slice(0, shape[2] - valid.shape[1])
    stats = None if past_stats is None else past_stats[..., old]
    return torch.cat([slot_places(pos[..., old], cursor, stats, rule), new], -1)


def side_by_side(valid: Tensor, cursor: Tensor, length: int, look: bool) -> Tensor | None:
    """The order of keys in which padding stands behind a row's tokens: int64 [B, 1, length]; None if it does not part
    any. Neighbours are then those that the row alone has. look: whether to ask the device, or give an order always.

    valid bool [B, S], of the last keys; those before it are slots, empties first. cursor before the call.
    """
    if look and not bool(_parted(valid, cursor).any()):
        return None
    start = length - valid.shape[1]
    own = start + (~valid).int().argsort(dim=-1, stable=True)
    old = torch.arange(start, device=valid.device).expand(len(valid), start)
    return torch.cat([old, own], -1)[:, None]


def _parted(valid: Tensor, cursor: Tensor) -> Tensor:
    """Whether padding stands between tokens of a row: bool [B]."""
    began = cursor[:, 0, SEEN, None] > 0
    before = torch.cat([began, valid[:, :-1]], -1)
    return (valid & ~before).sum(-1) > 1 - began[:, 0].int()


def ordered_by(x: Tensor, order: Tensor, dim: int = -1) -> Tensor:
    """x [1 or B, ..] with its dim `dim`, of length L, in an order [B, 1, L]."""
    at = dim % x.dim()
    index = order[:, 0].view(len(order), *[1] * (at - 1), -1, *[1] * (x.dim() - at - 1))
    x = x.expand(len(order), *x.shape[1:])
    return x.gather(at, index.expand_as(x))


def restored(x: Tensor, order: Tensor) -> Tensor:
    """The inverse for x [B, Hkv, L]."""
    return torch.empty_like(x).scatter_(-1, order.expand_as(x), x)


def protected_places(where: Tensor, end: Tensor, recent: Tensor | int, sinks: int) -> Tensor:
    """Bool, the shape of where: the last `recent` tokens before place `end`, and the first `sinks`."""
    recents = where >= end - recent
    return recents | (where < sinks) if sinks else recents
