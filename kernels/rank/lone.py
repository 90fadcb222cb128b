"""Rows to which a call of several tokens brings none, a single one, or few. Pure torch.

Alone they would not have been called, or for one step: the others' tokens must not change what they keep. Of few tokens
a rule may say that they are no ground to judge all others anew (`Timing.shortest`).
"""

from __future__ import annotations

import torch
from kvpass.kernels.attention.observation import Observation, emission, emitted
from kvpass.kernels.budget import budget
from kvpass.kernels.errors import RanksError
from kvpass.kernels.rank.criterion import SCORED
from kvpass.kernels.rank.places import NUMBER, PLACE
from kvpass.kernels.rank.rings import RING
from kvpass.kernels.rank.scored import Scoring, later
from kvpass.kernels.rank.scorers.registry import find_scorer
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import EXTRA, FREE, LIVE, SEEN, SHIFT
from kvpass.kernels.slots.statistics import Statistics, stat
from kvpass.kernels.timing import Timing
from torch import Tensor


def check_single(valid: Tensor, cursor: Tensor, rule: Rule) -> None:
    """Raises RanksError if a row gets a single token, whose heads would keep their shares (`stepped`), where the heads
    of several ranks share after the call; on a GPU the device asserts it.
    """
    if rule[ShareOut].share != "heads" or rule.of_steps is not rule:
        return
    good = ((valid.sum(-1) != 1) | (cursor[:, 0, SEEN] == 0)).all()
    if good.device.type != "cpu":
        torch._assert_async(good, "a row got one token in a call of several, where ranks share slots")
    elif not bool(good):
        raise RanksError(
            "a row got one token in a call in which others got several: its heads would keep their shares, which is "
            "not built where heads lie on several ranks",
            "give that row's token in a call of its own, or choose a policy whose heads hold equally many slots",
        )


def lone(valid: Tensor, cursor: Tensor, rule: Rule) -> Tensor:
    """Rows to which a call of several tokens brings one, so that it is as a call of one token to them: bool [B, 1]. Not
    where steps evict nothing, or shares of layers are about to change.
    """
    alike = rule.of_steps is rule and not rule[ShareOut].share
    return (valid.sum(-1, keepdim=True) == 1) & (cursor[:, :1, SEEN] > 0) & alike


def stepped(cursor: Tensor, after: Tensor, rule: Rule) -> Tensor:
    """The cursor of heads with budgets of their own after one token: they keep their shares."""
    live, out = cursor[..., LIVE], after.clone()
    room = torch.maximum(budget(rule, after[..., SEEN]) + cursor[..., EXTRA], live)
    out[..., LIVE] = out[..., FREE] = torch.minimum(live + 1, room)
    out[..., EXTRA], out[..., SHIFT] = cursor[..., EXTRA], cursor[..., SHIFT]
    return out


def few(valid: Tensor, cursor: Tensor, rule: Rule) -> Tensor:
    """Rows that go on, by fewer tokens than a scorer looks at: bool [B, 1]. valid [B, S], cursor before the call."""
    return (valid.sum(-1, keepdim=True) < rule[Timing].shortest) & (cursor[:, :1, SEEN] > 0)


def unjudged(total: Tensor, past: Tensor, where: Tensor, new: int, rows: Tensor, rule: Rule) -> None:
    """In `few` rows scores stay, and tokens hold what generated ones do. Changes total [N, B, Hkv, L]; past: the same,
    before the call; where: the places of the keys, of which the last `new` are the call's; rows: bool [B, 1].
    """
    if find_scorer(rule[Scoring].scorer).pointwise:
        return
    at = stat(rule, SCORED)
    held = torch.cat([past[at, ..., :-new], later(where[..., -new:])], -1)
    total[at] = torch.where(rows[..., None], held, total[at])


def as_in_steps(total: Tensor, past: Tensor, stats: Tensor, keys: tuple[Tensor, Tensor, Tensor], rule: Rule) -> None:
    """Rows to which a call of several tokens brought none change nothing; where it brought one, what slots keep is as
    after a call of one token. Changes total [N, B, Hkv, L]; past, the same: before the call; stats [M, B, Hkv, L]: what
    it emitted, by number; keys: the places of the keys, valid [B, S], and `lone`.
    """
    where, valid, one = keys
    none = ~valid.any(-1, keepdim=True)
    if total.device.type == "cpu" and not bool((one | none).any()):
        return
    alone = total.clone()
    for at, name in enumerate(rule[Statistics].stats):
        if name == SCORED and not find_scorer(rule[Scoring].scorer).pointwise:
            fresh = torch.where(where == where.amax(-1, keepdim=True), later(where), past[at])
        elif name not in emitted(rule) or name == SCORED:
            fresh = total[at]
        elif rule[Observation].decode == "add":
            own = stats[emission(rule, name)]
            fresh = torch.maximum(past[at], own) if name == "last" else past[at] + own
        else:
            fresh = stats[emission(rule, name)] if rule[Observation].decode == "replace" else past[at]
        alone[at] = fresh
    pick = [at for at, name in enumerate(rule[Statistics].stats) if name not in (PLACE, NUMBER, RING)]
    total[pick] = torch.where(one[..., None], alone[pick], total[pick])
    total[pick] = torch.where(none[..., None], past[pick], total[pick])
