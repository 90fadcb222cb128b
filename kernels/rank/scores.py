"""score_slots: how much each key of a call of several tokens deserves to stay, past slots among them. Pure torch on
every device.

Statistics of earlier calls, marks, rings, windows and pooling come together here (design/0001-state-and-kernels.md);
how slots rank is in `kvpass.kernels.rank.ranking`. Selects nothing.
"""

from __future__ import annotations

import torch
from kvpass.kernels.attention.masks import check_shown
from kvpass.kernels.attention.observation import Observation, emission, emitted
from kvpass.kernels.attention.visibility import Sees, shown_before
from kvpass.kernels.budget import budget
from kvpass.kernels.rank.allocate import with_preference
from kvpass.kernels.rank.criterion import DEMOTED, INF, SCORED
from kvpass.kernels.rank.lone import as_in_steps, check_single, few, lone, stepped, unjudged
from kvpass.kernels.rank.marks import DROP, MARK, marks_of_keys
from kvpass.kernels.rank.places import NUMBER, PLACE, key_places, new_places, side_by_side
from kvpass.kernels.rank.ranking import ranked, shared_by_heads, slot_scores
from kvpass.kernels.rank.replay import UNHEARD
from kvpass.kernels.rank.rings import RING, Rings, ringed
from kvpass.kernels.rank.scored import Beside, Scoring, scorer_scores
from kvpass.kernels.rank.scorers.registry import find_scorer
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rank.smooth import Pool, pooled
from kvpass.kernels.rank.weights import WEIGHT, Weight, value_weights
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import EXTRA, FIRST, FREE, LIVE, SEEN, SHIFT
from kvpass.kernels.slots.lookup import places_of
from kvpass.kernels.slots.ragged import Ragged, columns
from kvpass.kernels.slots.statistics import Statistics, keeps, stat
from kvpass.kernels.timing import Timing
from torch import Tensor


def score_slots(
    stats: Tensor,
    past_stats: Tensor | None,
    pos: Tensor | None,
    valid: Tensor,
    cursor: Tensor,
    position: int,
    rule: str,
    sees: str = "",
    mask: Tensor | None = None,
    bounds: Tensor | None = None,
    *given: Tensor | None,
    **named: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score every key after a multi-token call.

    stats: float32 [M, B, Hkv, L], what this call emitted (`emitted(rule)`). past_stats: float32 [N, B, Hkv, L], what
    the slots kept (`Statistics`; sums are added if the rule lets them `carry`). pos: int32 [B, Hkv, L] in ascending
    order, -1 = empty, or None (key l is at position l). valid: bool [B, S], the last S keys'. cursor: int32
    [B, Hkv, 4 or 6] before the call. position: of the call's first token. sees, mask, bounds: of the attention, checked
    if there is a past. given, named: of `Beside`, for rules with a scorer, a value weight or marks that reads them.

    Returns (score float32 [B, Hkv, L]: +inf protected, 3e38 untouchable, -3e38 demoted before, -inf no candidate; the
    statistics to keep [N, B, Hkv, L]; the new cursor). Raises ValueError if stats do not fit the rule, MaskError as
    `check_shown`.
    """
    plan, beside = Rule.parse(rule).of_call(position), Beside(*given, **named)
    if stats.dim() != 4 or stats.shape[0] != len(emitted(plan)):
        raise ValueError(f"score_slots: stats must be [{len(emitted(plan))}, B, Hkv, L], got {list(stats.shape)}")
    if pos is not None:
        check_shown(shown_before(Sees.parse(sees), bounds, mask, position), cursor[:, 0, SEEN])
    batch, heads, length = stats.shape[1:]
    candidate = _candidates(pos, valid, batch, heads, length)
    marked = marks_of_keys(beside.marks, past_stats, candidate, plan) if keeps(plan, MARK) else None
    if marked is not None:
        candidate = candidate & (marked < DROP)
    where = key_places(pos, valid, cursor, past_stats, (batch, heads, length), plan)
    end = torch.where(candidate, where, -1).amax(-1, keepdim=True) + 1
    after = _advanced(cursor, valid, candidate, position, plan)
    order = _neighbours(valid, cursor, length, plan)
    stats = _by_number(stats, valid, cursor, position, plan)
    total = _attention_statistics(stats, past_stats, plan)
    if plan[Pool].pool != "none" and not plan[Scoring].scorer:
        total[stat(plan, "sum")] = pooled(total[stat(plan, "sum")], where, candidate, end, plan, order)
    for name in {PLACE, NUMBER} & set(plan[Statistics].stats):
        total[stat(plan, name)] = 0.0 if past_stats is None else past_stats[stat(plan, name)]
        total[stat(plan, name), ..., length - valid.shape[1] :] = new_places(valid, cursor).float()
    if marked is not None:
        total[stat(plan, MARK)] = marked
    if keeps(plan, SCORED):
        past_scores = None if past_stats is None else past_stats[stat(plan, SCORED)]
        total[stat(plan, SCORED)], preferred = scorer_scores(
            stats,
            (where, candidate, end),
            after,
            beside,
            (past_scores, marked),
            (valid.shape[1], order),
            plan,
        )
        after = after if preferred is None else with_preference(after, preferred)
        if past_stats is not None and plan[Timing].shortest > 1:
            unjudged(total, past_stats, where, valid.shape[1], few(valid, cursor, plan), plan)
        if beside.replayed is not None:
            held = total[stat(plan, SCORED)]
            held.copy_(torch.where(beside.replayed > UNHEARD, beside.replayed, held))
    if keeps(plan, WEIGHT):
        assert beside.v is not None
        old = length - valid.shape[1]  # their weights stay: a share of all heads needs the same token in each
        total[stat(plan, WEIGHT), ..., old:] = value_weights(plan[Weight].weight, beside.v[:, :, old:], beside.wo, plan)
        if past_stats is not None:
            total[stat(plan, WEIGHT), ..., :old] = past_stats[stat(plan, WEIGHT), ..., :old]
    check_single(valid, cursor, plan)
    single = lone(valid, cursor, plan)
    if past_stats is not None:
        as_in_steps(total, past_stats, stats, (where, valid, single), plan)
    if not plan.evicts:
        return torch.where(candidate, INF, -INF), total, after
    if plan[ShareOut].share:  # all candidates stay until all layers are known
        return torch.where(candidate, INF, -INF), total, after
    if plan[Rings].rings:
        return _in_rings(total, past_stats, where, candidate, valid.shape[1], (cursor, after), plan)
    if beside.whole is not None and pos is not None:
        whole = _whole(beside.whole, pos, valid)
        score = ranked(total, where, candidate & whole, end, after, plan)
        return torch.where(candidate & ~whole, DEMOTED, score), total, after
    if not plan[Ragged].ragged:
        return ranked(total, where, candidate, end, after, plan), total, after
    extra = torch.where(single, cursor[..., EXTRA], 0)
    score = ranked(total, where, candidate, end, after, plan, extra)
    after = torch.where(single[..., None], stepped(cursor, after, plan), shared_by_heads(score, candidate, after, plan))
    return score, total, after


def _neighbours(valid: Tensor, cursor: Tensor, length: int, rule: Rule) -> Tensor | None:
    """The order of keys in which neighbours are looked at, as of `side_by_side`; None for theirs, or if nobody looks.

    A scorer's keys would have to be copied, so the device is asked before.
    """
    together = bool(rule[Scoring].scorer) and not find_scorer(rule[Scoring].scorer).pointwise
    if rule[Pool].pool == "none" and not together:
        return None
    return side_by_side(valid, cursor, length, look=together or valid.device.type == "cpu")


def _by_number(stats: Tensor, valid: Tensor, cursor: Tensor, position: int, rule: Rule) -> Tensor:
    """What was emitted, with `last` as a number among the row's valid tokens instead of a position."""
    if "last" not in emitted(rule):
        return stats
    at, stats = emission(rule, "last"), stats.clone()
    number = (new_places(valid, cursor) + 1).float().expand(*stats.shape[1:3], -1)
    index = (stats[at].long() - 1 - position).clamp(min=0)
    stats[at] = torch.where(stats[at] > 0, number.gather(-1, index), 0.0)
    return stats


def _in_rings(
    stats: Tensor,
    past: Tensor | None,
    pos: Tensor,
    candidate: Tensor,
    new: int,
    cursors: tuple[Tensor, Tensor],
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `score_slots` returns where slots are rings; `cursors`: before the call, and after it but for LIVE."""
    before, after = cursors
    rings = torch.zeros_like(stats[0]) if past is None else past[stat(rule, RING)].clone()
    size = budget(rule, after[..., SEEN])[..., None]
    stay = ringed(slot_scores(stats, pos, rule), rings, candidate, new, size, before, rule)
    stats[stat(rule, RING)] = rings
    after = after.clone()
    after[..., LIVE] = after[..., FREE] = stay.sum(-1).int()
    return torch.where(stay, INF, -INF), stats, after


def _attention_statistics(stats: Tensor, past: Tensor | None, rule: Rule) -> Tensor:
    """What the slots keep of what was emitted, float32 [N, B, Hkv, L]; rows that are no statistics of attention are
    left undefined.
    """
    if emitted(rule) == rule[Statistics].stats and "last" not in rule[Statistics].stats:
        return stats + past if past is not None and rule[Observation].carry else stats.clone()
    total = stats.new_empty(len(rule[Statistics].stats), *stats.shape[1:])
    for at, name in enumerate(rule[Statistics].stats):
        if name in emitted(rule):
            total[at] = stats[emitted(rule).index(name)]
            if past is not None and rule[Observation].carry:
                total[at] = torch.maximum(total[at], past[at]) if name == "last" else total[at] + past[at]
    return total


def _whole(at: Tensor, pos: Tensor, valid: Tensor) -> Tensor:
    """Keys that may be held whole: past slots that are, and the call's tokens. Bool [B, Hkv, L]."""
    _, there = places_of(at, pos[..., : pos.shape[-1] - valid.shape[1]])
    return torch.nn.functional.pad(there, (0, valid.shape[1]), value=True)


def _candidates(pos: Tensor | None, valid: Tensor, batch: int, heads: int, length: int) -> Tensor:
    """Keys that may stay: used past slots and valid new tokens. Bool [B, Hkv, L]."""
    new = valid[:, None, :].expand(batch, heads, valid.shape[1])
    if pos is None:
        return new
    return torch.cat([pos[..., : length - valid.shape[1]] >= 0, new], -1)


def _advanced(cursor: Tensor, valid: Tensor, candidate: Tensor, position: int, rule: Rule) -> Tensor:
    """The cursor after the call: int32 [B, Hkv, 4]."""
    seen = cursor[..., SEEN] + valid.sum(-1)[:, None]
    arrived = position + valid.int().argmax(-1)
    first = torch.where(valid.any(-1), arrived, -1)[:, None]
    first = torch.where(cursor[..., FIRST] >= 0, cursor[..., FIRST], first)
    live = candidate.sum(-1)
    stays = bool(rule[ShareOut].share) or rule.demotes
    live = live if stays else torch.minimum(budget(rule, seen), live)
    values, width = {LIVE: live, FREE: live, SEEN: seen, FIRST: first}, columns(rule)
    if rule[Ragged].ragged:
        values |= {EXTRA: torch.zeros_like(live), SHIFT: torch.zeros_like(live)}
    return torch.stack([values[c].int() for c in range(width)], -1)
