"""The slot that goes at the end of a step comes into others: fixed shapes, nothing read back, sums in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kvpass.kernels.exits import following, nearest, one_slot
from kvpass.kernels.exits.gates import lucky, moved
from kvpass.kernels.exits.record import BAR, MERGED, NEAREST_KEY, NEAREST_POSITION, NEXT, ONE_SLOT, Merge
from kvpass.kernels.exits.victim import Targets, Victims
from kvpass.kernels.exits.weights import weights
from kvpass.kernels.ranks import first_head, gathered
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.bias import BIAS
from kvpass.kernels.slots.reductions import Slots
from kvpass.kernels.slots.state import State
from kvpass.kernels.slots.statistics import stat
from torch import Tensor

_TARGETS: dict[str, Callable[[Victims, Rule], Targets]] = {
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
    targets = _TARGETS[merge.merge_into](victims, rule)
    if merge.merge_least > -1:
        targets = targets.where(targets.cosine >= merge.merge_least)
    weight = weights(targets, rule)
    if merge.merge_gate == "moving":
        targets = targets.where(_over_bar(targets, rule))
    elif merge.merge_gate == "chance":
        targets = targets.where(_by_chance(targets, rule))
    _added(targets, weight, rule)


def _over_bar(targets: Targets, rule: Rule) -> Tensor:
    """Whether the cosine, mean over the heads, reaches the bar, which moves: bool [B, 1, 1]."""
    bar, going = targets.victims.state[BAR], gathered(targets.there, rule)
    cosine = gathered(targets.cosine, rule)
    alike = torch.where(going, cosine, 0.0).sum(1, keepdim=True) / going.sum(1, keepdim=True).clamp(min=1)
    some = going.any(1, keepdim=True)
    after = torch.where(some, moved(bar[..., None], alike), bar[..., None])
    bar.copy_(after[..., 0])
    return some & (alike >= after[:, :1])


def _by_chance(targets: Targets, rule: Rule) -> Tensor:
    """Whether chance merges them: bool [B, Hkv, 1]."""
    victims = targets.victims
    sums = victims.state.stats[stat(rule, "sum")]
    kept = torch.where(targets.there, victims.cells(sums, targets.at), 0.0).sum(-1, keepdim=True) / targets.targets
    head = (torch.arange(sums.shape[1], device=sums.device) + first_head(rule, sums.shape[1]))[:, None]
    return lucky(victims.cells(sums, victims.at), kept, victims.cells(victims.place, victims.at), head, rule)


def _added(targets: Targets, weight: Tensor, rule: Rule) -> None:
    """Bring what goes, with a weight [B, Hkv, m or 1], into its targets."""
    merge, victims, state = rule[Merge], targets.victims, targets.victims.state
    own = 1.0 + state[MERGED][..., None] if merge.merge_into == ONE_SLOT else torch.ones_like(weight)
    divisor = {"weights": own + weight, "count": own + 1.0, "none": own}[merge.merge_mean]
    for half in merge.halves:
        held = targets.kept(half)
        total = (held * own[..., None] + targets.gone(half) * weight[..., None]) / divisor[..., None]
        after = torch.where(targets.there[..., None], total, held).to(state[half].dtype)
        state[half].view(-1, after.shape[3]).index_copy_(0, victims.flat_places(targets.at), after.flatten(0, 2))
    if merge.merge_into == ONE_SLOT:
        state[MERGED].add_(targets.there.sum(-1))
    if merge.counts:
        after = torch.where(targets.there, state[MERGED][..., None].log1p(), victims.cells(state[BIAS], targets.at))
        state[BIAS].view(-1).index_copy_(0, victims.flat_places(targets.at), after.flatten())
