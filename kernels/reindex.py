"""Positions inside the cache: keys turned as if nothing had ever stood between the slots. Pure torch.

Rotary embeddings know distances only, so nobody need touch queries or new keys: an older key is turned forward by the
number of tokens that were evicted after it (StreamingLLM, arXiv 2309.17453; FINCH, arXiv 2408.00167). A statistic of
the slots says where each key stands. Padding takes no place, as in the position ids that `generate` makes.
"""

from __future__ import annotations

import torch
from kvpass.kernels.allocate import ranks
from kvpass.kernels.errors import RotationError
from kvpass.kernels.ragged import places, used_slots
from kvpass.kernels.rule import PLACE, SEEN, Rule
from torch import Tensor

LOOSE = 0.02
"""Radians that the turn between two neighbours may differ from the mean: float32 angles of some 100,000 positions."""


def step_of(cos: Tensor, sin: Tensor) -> Tensor | None:
    """Radians that each pair of entries turns from one position to the next: float64 [D / 2]; None for one token.

    cos, sin: [.., S, D] of a call, entry i turning with entry i + D / 2. Padding (no turn at all) does not count.

    Raises:
        RotationError: the tokens do not follow each other.
    """
    half = cos.shape[-1] // 2
    turn = torch.complex(cos[..., :half].double(), sin[..., :half].double())
    steps = (turn[..., 1:, :] / turn[..., :-1, :]).flatten(0, -2)
    steps = steps[((steps - 1).abs() > 1e-9).any(-1)]
    if not len(steps):
        return None
    mean = (steps / steps.abs()).mean(0)
    if bool((steps / mean - 1).abs().median(0).values.gt(LOOSE).any()):
        raise RotationError(
            "the positions of this call do not rise by one from token to token",
            "give consecutive position_ids, or set positions: kept",
        )
    return mean.angle()


def reindex(state: list[Tensor], rule: Rule, step: Tensor | None) -> None:
    """Turn the keys of a state (k, v, pos, stats, cursor), in place, to their places among the slots in use.

    Raises:
        RotationError: keys must be turned and no call has said by how much.
    """
    k, _, pos, stats, cursor = state
    index, exist = places(cursor, k.shape[2], used_slots(cursor))
    where = pos.reshape(-1)[index].masked_fill(~exist, -1)
    place = stats[rule.stat(PLACE)].view(-1)
    wanted = cursor[..., SEEN, None] - 1 - ranks(where.double())
    more = torch.where(where < 0, 0.0, wanted - place[index])
    chosen = more != 0
    if not bool(chosen.any()):
        return
    if step is None:
        raise RotationError(
            "the first call of this cache had one token only", "begin with a prompt of two tokens or more"
        )
    rows = index[chosen]
    flat = k.view(-1, k.shape[3])
    angle = more[chosen].double()[:, None] * step.to(k.device)
    first, second = flat[rows].double().chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    flat[rows] = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(k.dtype)
    place[rows] = wanted[chosen].float()
