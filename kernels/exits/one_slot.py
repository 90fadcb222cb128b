"""One slot for all that goes: that of the first token behind the sinks, which stays (RazorAttention, arXiv 2407.15891).

It holds the mean of its own token and of all that went since; the rule protects it as one more sink.
"""

from __future__ import annotations

import torch
from kvpass.kernels.exits.leaving import Leaving
from kvpass.kernels.exits.victim import BEYOND, Targets, Victims
from kvpass.kernels.rank.places import Protected
from kvpass.kernels.rule import Rule
from torch import Tensor


def of_call(head: Leaving, rule: Rule) -> tuple[Tensor, Tensor]:
    """Which go where, int64 [P] each."""
    slot = rule[Protected].sinks - 1
    source = torch.arange(len(head.gone) if slot < len(head.kept) else 0, device=head.gone.device)
    return source, torch.full_like(source, slot)


def of_step(victims: Victims, rule: Rule) -> Targets:
    """The slot that each head's goes into."""
    slots, pos = victims.slots, torch.where(victims.used, victims.pos, BEYOND)
    rank = torch.full_like(victims.at, rule[Protected].sinks - 1)
    return Targets(victims, *victims.only(victims.kept & (pos == slots.of(slots.ranked(pos, rank)))))
