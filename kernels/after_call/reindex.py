"""Positions inside the cache: keys turned as if nothing had ever stood between the slots. Pure torch.

Rotary embeddings know distances only, so nobody need touch queries or new keys: an older key is turned forward by the
number of tokens that were evicted after it (StreamingLLM, arXiv 2309.17453; FINCH, arXiv 2408.00167). A statistic of
the slots says where each key stands, counted in its row's own tokens. By how much a pair of entries turns from one
position to the next is a property of the model and not of a batch: it is read from the model's own function of
positions where the graph has it, else from keys that stand next to each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from kvpass.kernels.errors import RotationError
from kvpass.kernels.rank.allocate import ranks
from kvpass.kernels.rank.places import PLACE
from kvpass.kernels.rule import Record, Rule
from kvpass.kernels.slots.cursor import SEEN
from kvpass.kernels.slots.ragged import places, used_slots
from kvpass.kernels.slots.state import State
from kvpass.kernels.slots.statistics import stat
from torch import Tensor


@dataclass(frozen=True)
class Reindex(Record):
    """Whether keys are turned to their places in the cache after each call."""

    reindex: bool = False


LOOSE = 0.02
"""Radians by which a key may stand elsewhere than its place says."""

ROUNDING = 2.0**-22
"""The same as a share of all that a key was turned: angles are float32 products."""

FARTHEST = 2**16
"""Largest position at which a model is asked for its angles: the farther, the more exact is the step."""


PIECE = 4096
"""Keys that are turned at once, in float64: all keys of a layer would be a layer's memory several times. On a device 16
times as many, where each piece costs a dozen launches.
"""


def turns_of(cos: Tensor, sin: Tensor) -> Tensor:
    """cos, sin [1 or B, (1,) S, F] or [S, F] -> how far each pair of entries is turned, complex128 [1 or B, S, F] of
    length 1.
    """
    turn = torch.complex(cos.double(), sin.double()).reshape(-1, *cos.shape[-2:])
    return turn / turn.abs().clamp(min=1e-30)  # some models scale their rotations


def step_at(turn: Callable[[int], Tensor], most: int = FARTHEST) -> Tensor | None:
    """Radians that each pair turns from one position to the next, float64 [F]; None if it is not the same everywhere.

    turn: `turns_of` a call whose tokens all stand at the given position; it is asked for 0, 1, 16, 256, .. up to
    `most` (at least 1): each is 16 times as exact as the one before, and says how often that one went round.
    """
    start = _same_everywhere(turn(0))
    step, at = torch.zeros(()), 1
    while start is not None and at <= max(most, 1):
        here = _same_everywhere(turn(at))
        if here is None:
            return None
        more = (here / start * torch.polar(torch.ones_like(here.real), -at * step.to(here.real))).angle()
        if at > 1 and bool((more.abs() > LOOSE + at * step.abs() * ROUNDING).any()):
            return None  # frequencies that depend on the length
        step, at = step + more / at, 16 * at
    return step if start is not None and bool((step.abs() > 1e-7).any()) else None


def _same_everywhere(turn: Tensor) -> Tensor | None:
    """[n, S, F] -> [F]; None if tokens at one position are turned differently."""
    flat = turn.flatten(0, 1)
    return flat[0] if bool(((flat - flat[0]).abs() < 1e-6).all()) else None


def step_between(turn: Tensor, place: Tensor) -> Tensor | None:
    """The same, measured on a call's keys: the mean over neighbours in `place` (`new_places`); None without any.

    turn: complex128 [1 or B, S, F].
    """
    near = (place[:, :-1] >= 0) & (place[:, 1:] - place[:, :-1] == 1)
    rows, columns = near.nonzero(as_tuple=True)
    if not len(rows):
        return None
    rows = rows % len(turn)  # alike for all rows, or one for each
    step: Tensor = (turn[rows, columns + 1] / turn[rows, columns]).mean(0).angle()
    return step


def new_places(state: State, rule: Rule, start: int, count: int) -> Tensor:
    """Which of its row's tokens each of the last `count` columns from `start` on is: float32 [B, count], -1 where no
    head kept it. To be read before these keys are turned.
    """
    pos, stats = state.pos, state.stats
    index, exist = places(state.cursor, state.slots, used_slots(state.cursor))
    column = torch.where(exist, pos.reshape(-1)[index], -1).long() - start
    column = torch.where(column < 0, count, column).flatten(1)
    place = stats[stat(rule, PLACE)].reshape(-1)[index].flatten(1)
    return place.new_full((len(pos), count + 1), -1.0).scatter_(1, column, place)[:, :count]


def checked(turn: Tensor, place: Tensor, step: Tensor, zero: Tensor | None) -> Tensor:
    """How far place 0 of each row is turned, complex128 [B, F], 0 for rows that have no key yet: as in `zero`, what
    earlier calls found.

    turn: complex128 [1 or B, S, F]; place: [B, S], as of `new_places`.

    Raises:
        RotationError: a kept key is not turned as its place says, so that no step of the row's tokens is one position.
    """
    if zero is None:
        zero = turn.new_zeros(len(place), turn.shape[-1])
    rows, columns = (place >= 0).nonzero(as_tuple=True)
    far = place[rows, columns].double()[:, None] * step
    base = turn[rows % len(turn), columns] * torch.polar(torch.ones_like(far), -far)
    numbers = torch.arange(len(rows), device=rows.device)
    first = numbers.new_full((len(place),), len(rows)).scatter_reduce_(0, rows, numbers, "amin")
    fresh = (first < len(rows)) & (zero == 0).all(-1)
    zero = zero.clone()
    zero[fresh] = base[first[fresh]]
    off = ((base / zero[rows]).angle().abs() > LOOSE + far.abs() * ROUNDING).any(-1)
    if bool(off.any()):
        raise RotationError(
            f"the positions of row {int(rows[off][0])} do not rise by one from token to token (padding left out), or "
            "the model changes its rotary frequencies with the length",
            "let position_ids count each row's own tokens, (attention_mask.cumsum(-1) - 1).clamp(min=0), as generate "
            "does if it is given the attention_mask; or choose a policy with positions: kept, e.g. streaming_llm",
        )
    return zero


def reindex(state: State, rule: Rule, step: Tensor) -> None:
    """Turn the keys of a state, in place, to their places among the slots in use.

    step: radians per position, float64 [D / 2].
    """
    k, cursor = state.k, state.cursor
    index, exist = places(cursor, state.slots, used_slots(cursor))
    where = state.pos.reshape(-1)[index].masked_fill(~exist, -1)
    place = state.stats[stat(rule, PLACE)].view(-1)
    wanted = cursor[..., SEEN, None] - 1 - ranks(where.double())
    more = torch.where(where < 0, 0.0, wanted - place[index])
    chosen = more != 0
    if not bool(chosen.any()):
        return
    rows, turns = index[chosen], more[chosen].double()
    flat, step = k.view(-1, k.shape[3]), step.to(k.device)
    size = PIECE if k.device.type == "cpu" else 16 * PIECE
    for part, turn in zip(rows.split(size), turns.split(size), strict=True):
        angle = turn[:, None] * step
        first, second = flat[part].double().chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        flat[part] = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(k.dtype)
    place[rows] = wanted[chosen].float()
