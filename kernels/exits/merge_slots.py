"""merge_slots: what a call of several tokens evicts comes into the slots that stay. Pure torch on every device.

After `compact_slots`, head by head: each has its own number of slots that go. Sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from kvpass.kernels.exits import following, nearest, one_slot, runs
from kvpass.kernels.exits.gates import lucky, moved
from kvpass.kernels.exits.leaving import Couples, Leaving, places_of
from kvpass.kernels.exits.record import BAR, MERGED, NEAREST_KEY, NEAREST_POSITION, NEXT, ONE_SLOT, RUN, Merge
from kvpass.kernels.exits.weights import weights
from kvpass.kernels.ranks import first_head, gathered
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.bias import BIAS
from kvpass.kernels.slots.cursor import LIVE
from kvpass.kernels.slots.ragged import starts
from kvpass.kernels.slots.state import State, flat
from kvpass.kernels.slots.statistics import stat
from torch import Tensor

_TARGETS: dict[str, Callable[[Leaving, Rule], tuple[Tensor, Tensor]]] = {
    NEAREST_KEY: nearest.key_of_call,
    NEAREST_POSITION: nearest.position_of_call,
    NEXT: following.of_call,
    RUN: runs.of_call,
    ONE_SLOT: one_slot.of_call,
}


def merge_slots(
    k: Tensor, v: Tensor, score: Tensor, stats: Tensor, idx: Tensor, state: Sequence[Tensor], rule: str
) -> None:
    """Merge the keys that are not selected into those that are, in place, after `compact_slots`.

    k [B, Hkv, L, D], v [B, Hkv, L, Dv]: the keys and values that it gathered from, by position; score float32
    [B, Hkv, L] and stats float32 [N, B, Hkv, L] as of `score_slots`: keys of score -inf are nobody's, and are dropped;
    idx int32 [B, Hkv, n] of `select_slots`. state: the tensors of `State` under the rule.
    """
    plan = Rule.parse(rule)
    if plan[Merge].calls:
        merge(k, v, (score, stats, idx), State.of(state, plan), plan)


def merge(k: Tensor, v: Tensor, ranked: tuple[Tensor, Tensor, Tensor], state: State, rule: Rule) -> None:
    """The same for a `State`, whatever the rule's moment. ranked: score, stats and idx."""
    score, stats, idx = ranked
    first, live = starts(state.cursor, state.slots).tolist(), state.cursor[..., LIVE].tolist()
    before = first_head(rule, k.shape[1])
    for b in range(len(k)):
        heads = [
            _leaving((k[b, h], v[b, h], score[b, h], stats[:, b, h]), idx[b, h, : live[b][h]].long(), before + h, rule)
            for h in range(k.shape[1])
        ]
        pairs = [_couples(head, rule) for head in heads]
        if rule[Merge].merge_gate == "moving":
            pairs = _over_bar(pairs, state[BAR][b], rule)
        for h, couples in enumerate(pairs):
            _added(couples, first[b][h], state, (b, h), rule)


def _leaving(keys: tuple[Tensor, Tensor, Tensor, Tensor], kept: Tensor, head: int, rule: Rule) -> Leaving:
    _, _, score, stats = keys
    gone = score > -torch.inf
    gone[kept] = False
    return Leaving(*keys, gone.nonzero().flatten(), kept, places_of(stats, rule), head)


def _couples(head: Leaving, rule: Rule) -> Couples:
    """Which go where, but for a moving gate."""
    none = head.gone[:0]
    if not len(head.gone) or not len(head.kept):
        return Couples(head, none, none)
    merge, couples = rule[Merge], Couples(head, *_TARGETS[rule[Merge].merge_into](head, rule))
    if merge.merge_least > -1 and merge.merge_into != RUN:  # where it joins the run's neighbours
        couples = couples.where(couples.cosine >= merge.merge_least)
    return couples.where(_by_chance(couples, rule)[couples.source]) if merge.merge_gate == "chance" else couples


def _by_chance(couples: Couples, rule: Rule) -> Tensor:
    """Whether each of the slots that go is merged: bool [E]."""
    head, sums = couples.head, couples.head.stats[stat(rule, "sum")]
    count = len(head.gone)
    kept = sums.new_zeros(count).index_add(0, couples.source, sums[head.kept[couples.target]])
    mean = kept / torch.bincount(couples.source, minlength=count).clamp(min=1)
    return lucky(sums[head.gone], mean, head.gone_places, head.head, rule)


def _over_bar(pairs: list[Couples], bar: Tensor, rule: Rule) -> list[Couples]:
    """Those whose cosine, mean over the heads' slots that go, each head's in order, reaches the bar [Hkv], which moves.
    Heads hold, and lose, equally many slots.
    """
    if not len(pairs[0].source):
        return pairs
    alike = gathered(torch.stack([couples.cosine for couples in pairs]), rule, 0).mean(0)
    bar.copy_(moved(bar, alike.mean()))
    return [couples.where(alike >= bar[0]) for couples in pairs]


def _added(couples: Couples, first: int, state: State, at: tuple[int, int], rule: Rule) -> None:
    """Bring what goes into the slots of a head, whose slot 0 is at place `first` of the flattened memory."""
    if not len(couples.source):
        return
    merge, slots, weight = rule[Merge], len(couples.head.kept), weights(couples, rule)
    zero = weight.new_zeros(slots)
    count = zero.index_add(0, couples.target, torch.ones_like(weight))
    share = zero.index_add(0, couples.target, weight)
    own = 1.0 + state[MERGED][at] if merge.merge_into == ONE_SLOT else 1.0
    divisor = {"weights": own + share, "count": own + count, "none": 1.0 + zero}[merge.merge_mean]
    for field, tensor in state.per_slot():
        if field.name not in merge.halves:
            continue
        there = flat(field, tensor).narrow(field.rows, first, slots)
        held = there.float()
        total = (held * own).index_add(0, couples.target, couples.gone(field.name) * weight[:, None])
        there.copy_(torch.where((count > 0)[:, None], (total / divisor[:, None]).to(there.dtype), there))
    if merge.merge_into == ONE_SLOT:
        state[MERGED][at] += len(couples.source)
    if merge.counts:
        state[BIAS].view(-1)[first + couples.target[0]] = state[MERGED][at].log1p()
