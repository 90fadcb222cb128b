"""The slot that goes at the end of a step comes into others: fixed shapes, nothing read back, sums in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kvpass.kernels.exits import following, nearest, one_slot
from kvpass.kernels.exits.gates import lucky, moved
from kvpass.kernels.exits.record import BAR, MERGED, NEAREST_KEY, NEAREST_POSITION, NEXT, ONE_SLOT, Merge
from kvpass.kernels.exits.victim import Victims
from kvpass.kernels.exits.weights import weights
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.reductions import Slots
from kvpass.kernels.slots.state import State
from kvpass.kernels.slots.statistics import stat
from torch import Tensor

_TARGETS: dict[str, Callable[[Victims, Rule], Tensor]] = {
    NEAREST_KEY: nearest.key_of_step,
    NEAREST_POSITION: nearest.position_of_step,
    NEXT: following.of_step,
    ONE_SLOT: one_slot.of_step,
}


def merge_victim(state: State, slots: Slots, used: Tensor, gone: Tensor, rule: Rule) -> None:
    """Merge the slots that go into those that stay, in place, while positions and contents are still there.

    used: bool [B, Hkv, C], slots in use, with the token; gone: likewise, at most one of each head.
    """
    merge, victims = rule[Merge], Victims(state, slots, used, gone, rule)
    chosen = victims.chosen = _TARGETS[merge.merge_into](victims, rule)
    if merge.merge_least > -1:
        chosen = victims.chosen = chosen & (victims.cosine >= merge.merge_least)
    if merge.merge_gate == "moving":
        chosen = chosen & slots.of(_over_bar(victims))
    elif merge.merge_gate == "chance":
        chosen = chosen & slots.of(_by_chance(victims, rule))
    _added(victims, chosen, rule)


def _over_bar(victims: Victims) -> Tensor:
    """Whether the cosine, mean over the heads, reaches the bar, which moves: bool [B, 1, 1]."""
    bar, slots, going = victims.state[BAR], victims.slots, victims.going
    best = slots.amax(torch.where(victims.chosen, victims.cosine, -1.0))
    alike = torch.where(going, best, 0.0).sum(1, keepdim=True) / going.sum(1, keepdim=True).clamp(min=1)
    some = going.any(1, keepdim=True)
    after = torch.where(some, moved(bar[..., None], alike), bar[..., None])
    bar.copy_(after[..., 0])
    return some & (alike >= after[:, :1])


def _by_chance(victims: Victims, rule: Rule) -> Tensor:
    """Whether chance merges them: bool [B, Hkv, 1]."""
    slots, sums = victims.slots, victims.state.stats[stat(rule, "sum")]
    kept = slots.sum(torch.where(victims.chosen, sums, 0.0)) / slots.sum(victims.chosen).clamp(min=1)
    head = torch.arange(sums.shape[1], device=sums.device)[:, None]
    return lucky(victims.own(sums), kept, victims.own(victims.place), head, rule)


def _added(victims: Victims, chosen: Tensor, rule: Rule) -> None:
    """Bring what goes into the chosen slots, bool [B, Hkv, C]."""
    merge, slots, state = rule[Merge], victims.slots, victims.state
    weight, own = weights(victims, rule), torch.ones(1, 1, 1, device=chosen.device)
    if merge.merge_into == ONE_SLOT:
        own = slots.of(1.0 + state[MERGED][..., None])
    divisor = {"weights": own + weight, "count": own + 1.0, "none": own}[merge.merge_mean]
    for half in merge.halves:
        held, comes = victims.entries(half), victims.per_slot(victims.gone_entries(half))
        total = (held * own[..., None] + comes * weight[..., None]) / divisor[..., None]
        state[half].copy_(torch.where(chosen[..., None], total.to(state[half].dtype), state[half]))
    if merge.merge_into == ONE_SLOT:
        state[MERGED].add_(slots.sum(chosen)[..., 0])
