"""Slots for heads that look far, and in each of them for keys unlike the others and keys that are heard, by turns."""

from __future__ import annotations

import torch
from kvpass.kernels.rank.allocate import ranks
from kvpass.kernels.rank.scorers.geometry import keydiff
from kvpass.kernels.rank.scorers.registry import scorer
from kvpass.kernels.rank.scorers.seen import Seen
from kvpass.kernels.rank.scorers.window import window_mean
from torch import Tensor


@scorer("reach", reads=("rows", "keys"), heads="each")
def reach(seen: Seen, sinks: int = 4, near: int = 128, sharp: float = 2.0, heard: float = 0.5) -> Tensor:
    """A head's reach, to the power `sharp`, over 1 + the key's rank in it: where one ranking chooses for all heads and
    layers, each head gets slots in proportion to that (kvpass' own, docs/design/0022).

    Reach is the mean, over keys that are neither among the `sinks` first nor the `near` last tokens, of the most that a
    query of the window gave the key; 1 for all heads where a row has no such keys. It tells heads that find things from
    heads that look at what is near, whatever will be asked. Within a head two lists take turns: keys that are unlike
    the others (`keydiff`), and, `heard` of them for each of those, keys that get most of the window's mean attention:
    what nobody asked for yet, and what the text goes on from.
    """
    far = seen.candidate & (seen.pos >= seen.first + sinks) & (seen.pos < seen.end - near)
    count = far.sum(-1, keepdim=True)
    most = torch.where(far, seen.observed.amax((2, 3)), 0.0).sum(-1, keepdim=True) / count.clamp(min=1)
    mean = window_mean(seen.observed, seen).mean(2)
    place = torch.minimum(_place(keydiff(seen), seen), (_place(mean, seen) + 0.5) / heard)
    order = ranks(torch.where(seen.candidate, -place, -torch.inf))
    return torch.where(count > 0, most, 1.0) ** sharp / (1 + order)


def _place(score: Tensor, seen: Seen) -> Tensor:
    """float32 [B, Hkv, L]: ranks of candidates, the best 0."""
    return ranks(torch.where(seen.candidate, score, -torch.inf)).float()
