"""Scorers that look at all heads of a layer, or at a head's number, where the heads lie on several ranks.

They are shown all of them, as if there were one rank, and each rank takes its own heads' scores. So every scorer is
right without knowing of ranks; one that says `heads="each"` spares the exchange.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from kvpass.kernels.rank.scorers.registry import Scorer
from kvpass.kernels.rank.scorers.seen import Seen
from kvpass.kernels.ranks import elsewhere, gathered, own_part, widest
from kvpass.kernels.rule import Rule
from torch import Tensor


def scored(scorer: Scorer, seen: Seen, options: str, rule: Rule) -> Tensor:
    """`Scorer.score` of this rank's heads: float32 [B, Hkv, L]."""
    if scorer.each or not elsewhere(rule):
        return scorer.score(seen, options)
    score = own_part(scorer.score(_of_all(scorer, seen, rule), options), rule)
    return score[..., score.shape[-1] - seen.pos.shape[-1] :]


def preferred(scorer: Scorer, seen: Seen, rule: Rule) -> Tensor:
    """`Scorer.prefer` of the layer, all heads of it: float [B]."""
    return scorer.prefer(_of_all(scorer, seen, rule) if elsewhere(rule) else seen)


def _of_all(scorer: Scorer, seen: Seen, rule: Rule) -> Seen:
    """What one process would see: the heads of all ranks, and empty keys in front of those of ranks that hold fewer."""
    more = widest(seen.pos, rule) - seen.pos.shape[-1]
    hidden = -torch.inf if "logits" in scorer.reads else 0.0

    def of_all(x: Tensor | None, fill: float = 0.0, behind: int = 0) -> Tensor | None:
        """behind: dims behind that of the keys."""
        if x is None:
            return None
        x = torch.nn.functional.pad(x, (0, 0) * behind + (more, 0), value=fill) if more else x
        return gathered(x, rule)

    facts = gathered(torch.cat([x.long() for x in (seen.end, seen.first, seen.seen, seen.budget)], -1), rule)
    end, first, count, size = facts.split(1, -1)
    pos, candidate = of_all(seen.pos, -1), of_all(seen.candidate)
    assert pos is not None
    assert candidate is not None
    statistics = {name: found for name, x in seen.statistics.items() if (found := of_all(x)) is not None}
    return replace(
        seen,
        pos=pos,
        candidate=candidate,
        end=end.to(seen.end.dtype),
        first=first.to(seen.first.dtype),
        seen=count,
        budget=size,
        k=of_all(seen.k, behind=1),
        v=of_all(seen.v, behind=1),
        rows=of_all(seen.rows, hidden),
        statistics=statistics,
        q=None if seen.q is None else gathered(seen.q, rule),
        stay=of_all(seen.stay),
        heads_before=0,
    )
