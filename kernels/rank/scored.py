"""Scores that slots hold: from a scorer, in a multi-token call or when a token arrives. Pure torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from kvpass.kernels.attention.observation import Observation, emitted
from kvpass.kernels.budget import budget, part
from kvpass.kernels.rank.allocate import ranks
from kvpass.kernels.rank.criterion import SCORED, Ranking
from kvpass.kernels.rank.layer import Layer
from kvpass.kernels.rank.marks import KEEP, MARK
from kvpass.kernels.rank.of_ranks import preferred, scored
from kvpass.kernels.rank.places import NUMBER, PLACE, Protected, ordered_by, restored
from kvpass.kernels.rank.scorers.chance import gumbel
from kvpass.kernels.rank.scorers.registry import find_scorer
from kvpass.kernels.rank.scorers.seen import Seen
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rank.smooth import Fair, Granule, Pool, by_granule, fair_shares, pooled
from kvpass.kernels.rank.weights import WEIGHT, Weight, value_weights
from kvpass.kernels.ranks import first_head, gathered
from kvpass.kernels.rule import Record, Rule
from kvpass.kernels.slots.cursor import SEEN
from kvpass.kernels.slots.statistics import Statistics, keeps, stat
from torch import Tensor

GROWING = {"r_kv": "T*T cosines", "compactor": "256*T"}
"""Work of scorers that grows faster than what they read."""


@dataclass(frozen=True)
class Scoring(Record):
    """The scorer of a rule whose slots hold a score.

    Attributes:
        options: of the scorer, as `encode_options` writes them.
        reads: what it reads, of `scorers.seen.READS`.
        decay: a score counts once for each token since.
        seed: of whatever is drawn by chance.
    """

    scorer: str = ""
    options: str = ""
    reads: tuple[str, ...] = ()
    decay: bool = False
    seed: int = 0

    def work(self, rule: Rule) -> Iterator[str]:
        if self.windowed and rule[Observation].queries:
            yield rule[Observation].rows
        if self.scorer in GROWING:
            yield GROWING[self.scorer]

    @property
    def joins(self) -> bool:
        return bool(self.scorer) and not find_scorer(self.scorer).each

    @property
    def windowed(self) -> bool:
        """Whether it reads the rows of the observation window."""
        return bool({"rows", "logits"} & set(self.reads))

    @property
    def of_new_tokens(self) -> bool:
        """Whether it sees a call's own tokens only, so that scores of older slots stay."""
        return bool({"hidden", "own"} & set(self.reads))


@dataclass(frozen=True)
class Sample(Record):
    """The share of the budget that chance chooses (NACL, arXiv 2408.03675)."""

    sample_num: int = 0
    sample_den: int = 1

    @property
    def joins(self) -> bool:
        return self.sample_num > 0


LATER = 0x7E000000
"""Bits of the float32 that a generated token holds at place 0; each later place adds one. All are above any real score
and below `UNTOUCHABLE`, and they rise with the place: of generated tokens the oldest goes first.
"""

UNSCORED = 2.0**125
"""The same at place 0, as a number: no value weight multiplies what is as large."""

LUCK = 18.0
"""More than any Gumbel number that a float32 of 24 random bits gives (17)."""


class Beside(NamedTuple):
    """What a rule may read beside attention's statistics."""

    k: Tensor | None = None
    """[B, Hkv, L, D], keys as cached."""
    v: Tensor | None = None
    """[B, Hkv, L, Dv]"""
    rows: Tensor | None = None
    """Of `window_rows`."""
    wo: Tensor | None = None
    """[out, Hq * Dv], the output projection's weight."""
    hidden: Tensor | None = None
    """[B, S, size]"""
    marks: Tensor | None = None
    """int32 [B, S], of the call's tokens, for rules that are `marked`."""
    queries: Tensor | None = None
    """[B, Hq, S, D], before their rotation."""
    turns: Tensor | None = None
    """[2, 1 or B, S, D], cosines and sines of that rotation."""
    whole: Tensor | None = None
    """int32 [B, Hkv, W], positions of the past tokens that are not demoted, -1 none, for rules that demote."""
    replayed: Tensor | None = None
    """Of `replay_scores`, for rules with a `Replay`, in calls with a past."""


def scorer_scores(
    stats: Tensor,
    keys: tuple[Tensor, Tensor, Tensor],
    cursor: Tensor,
    beside: Beside,
    had: tuple[Tensor | None, Tensor | None],
    own: tuple[int, Tensor | None],
    rule: Rule,
) -> tuple[Tensor, Tensor | None]:
    """What each key holds after a multi-token call, float32 [B, Hkv, L]; and what the layer is preferred by, [B], if
    layers share by it.

    stats: [M, B, Hkv, L] that the call emitted; keys: places, candidates and end, as in `Seen`; cursor: after the
    call; beside: what the scorer reads; had: [B, Hkv, L] each, what the slots held, and their marks; own: how many
    of the keys are the call's, and the order in which keys are neighbours, if not theirs (`side_by_side`).
    """
    (pos, candidate, end), (past, marks), (called, order) = keys, had, own
    chosen = find_scorer(rule[Scoring].scorer)
    if rule[Scoring].of_new_tokens:
        new = slice(pos.shape[-1] - called, None)
        k, v = (t if t is None else t[:, :, new] for t in beside[:2])
        seen = _seen(pos[..., new], candidate[..., new], end, cursor, beside._replace(k=k, v=v), rule, {})
        score = scored(chosen, seen, rule[Scoring].options, rule)
        return score if past is None else torch.cat([past[..., : new.start], score], -1), None
    if order is not None:
        keys = ordered_by(pos, order), ordered_by(candidate, order), end
        stats = torch.stack([ordered_by(x, order) for x in stats]) if len(stats) else stats
        marks = marks if marks is None else ordered_by(marks, order)
        beside = _in_order(beside, order, called, rule)
        score, prefers = scorer_scores(stats, keys, cursor, beside, (None, marks), (called, None), rule)
        return restored(score, order), prefers
    seen = _seen(pos, candidate, end, cursor, beside, rule, dict(zip(emitted(rule), stats, strict=True)), marks)
    score = scored(chosen, seen, rule[Scoring].options, rule)
    if rule[Pool].pool != "none":
        score = pooled(score, pos, candidate, end, rule)
    if rule[Granule].granule > 1:
        score = by_granule(score, pos, candidate & (pos < end - rule[Observation].window), seen.first, rule)
    if rule[Ranking].heads == "all":
        score = gathered(score, rule).mean(1, keepdim=True).expand_as(score)
    if rule[Fair].fair and marks is not None:
        score = fair_shares(score, marks % KEEP, candidate & (pos < end - rule[Observation].window))
    score = _sampled(score, seen, rule) if rule[Sample].sample_num else score
    # the protected window is not judged: when its keys leave it, they stay as generated ones do
    window = candidate & (pos >= end - min(rule[Observation].window, rule[Protected].recent))
    shared = chosen.preference is not None and rule[ShareOut].share == "preference"
    return torch.where(window, later(pos), score), preferred(chosen, seen, rule) if shared else None


def _in_order(tensors: Beside, order: Tensor, called: int, rule: Rule) -> Beside:
    """What the scorer reads, keys in another order, the call's queries likewise."""
    own = order[..., -called:] - (order.shape[-1] - called)

    def moved(x: Tensor | None, dim: int, by: Tensor = order) -> Tensor | None:
        return x if x is None else ordered_by(x, by, dim)

    turns = tensors.turns
    return tensors._replace(
        k=moved(tensors.k, 2) if "keys" in rule[Scoring].reads else None,
        v=moved(tensors.v, 2) if "values" in rule[Scoring].reads else None,
        rows=moved(tensors.rows, -1),
        queries=moved(tensors.queries, 2, own),
        turns=turns if turns is None else torch.stack([ordered_by(x, own, 1) for x in turns]),
    )


def later(pos: Tensor) -> Tensor:
    """float32: above every real score, rising with the place."""
    return (pos + LATER).view(torch.float32)


def _seen(
    pos: Tensor,
    candidate: Tensor,
    end: Tensor,
    cursor: Tensor,
    tensors: Beside,
    rule: Rule,
    statistics: dict[str, Tensor],
    marks: Tensor | None = None,
) -> Seen:
    seen = cursor[..., SEEN, None].long()
    return Seen(
        pos=pos,
        candidate=candidate,
        end=end,
        first=torch.zeros_like(seen),
        seen=seen,
        budget=budget(rule, seen),
        window=rule[Observation].window,
        seed=rule[Scoring].seed,
        k=tensors.k if "keys" in rule[Scoring].reads else None,
        v=tensors.v if "values" in rule[Scoring].reads else None,
        rows=tensors.rows,
        statistics=statistics,
        h=tensors.hidden,
        q=tensors.queries,
        turns=tensors.turns,
        at=rule[Layer].layer if "layer" in rule[Scoring].reads or rule[Sample].sample_num else None,
        stay=(marks >= KEEP) & candidate if marks is not None and "marks" in rule[Scoring].reads else None,
        heads_before=first_head(rule, pos.shape[1]),
    )


def _sampled(score: Tensor, seen: Seen, rule: Rule) -> Tensor:
    """Let chance choose a share of the budget (NACL, arXiv 2408.03675): beside the best, keys are drawn without
    replacement with probability softmax(score).
    """
    inside = seen.before_window & (seen.pos >= seen.first + rule[Protected].sinks)
    drawn = part(seen.budget, rule[Sample].sample_num, rule[Sample].sample_den)
    protected = rule[Protected].window(seen.budget) + rule[Protected].sinks
    sure = (seen.budget - drawn - protected).clamp(min=0)
    rank = ranks(torch.where(inside, score, -torch.inf))
    most = torch.where(inside, score, -torch.inf).amax(-1, keepdim=True)
    least = torch.where(inside, score, torch.inf).amin(-1, keepdim=True)
    lift = (most - least).clamp(min=0) + LUCK  # no luck brings the worst above the best
    return torch.where(inside, torch.where(rank < sure, score + lift, score + gumbel(seen)), score)


def arrivals(
    k_new: Tensor,
    v_new: Tensor,
    cursor: Tensor,
    position: int,
    rule: str,
    wo: Tensor | None = None,
    hidden: Tensor | None = None,
    marks: Tensor | None = None,
) -> Tensor:
    """Statistics of a token's slot when it comes, in a call of one token: float32 [N, B, Hkv].

    k_new [B, Hkv, 1, D], v_new [B, Hkv, 1, Dv], cursor int32 [B, Hkv, 4 or 6] before the call; wo, hidden [B, 1, size]
    and marks [B, 1] as for `score_slots`. Attention's statistics start at 0; a pointwise scorer scores the token, of
    others it stays as long as any prompt token; a value weight is that of its value.
    """
    plan = Rule.parse(rule)
    batch, heads = k_new.shape[:2]
    out = torch.zeros(len(plan[Statistics].stats), batch, heads, device=k_new.device)
    if keeps(plan, SCORED):
        out[stat(plan, SCORED)] = _arriving(Beside(k_new, v_new, hidden=hidden), cursor, plan)
    if keeps(plan, MARK) and marks is not None:
        out[stat(plan, MARK)] = marks.float()
    for name in {PLACE, NUMBER} & set(plan[Statistics].stats):
        out[stat(plan, name)] = cursor[..., SEEN].float()
    if keeps(plan, WEIGHT):
        out[stat(plan, WEIGHT)] = value_weights(plan[Weight].weight, v_new, wo, plan)[..., 0]
    return out


def _arriving(tensors: Beside, cursor: Tensor, rule: Rule) -> Tensor:
    """What a token of a one-token call holds: float32 [B, Hkv]."""
    pos = cursor[..., SEEN, None]
    chosen = find_scorer(rule[Scoring].scorer)
    if not chosen.pointwise:
        return later(pos)[..., 0]
    cursor = cursor.clone()
    cursor[..., SEEN] += 1
    seen = _seen(pos, torch.ones_like(pos, dtype=torch.bool), pos + 1, cursor, tensors, rule, {})
    return scored(chosen, seen, rule[Scoring].options, rule)[..., 0]
