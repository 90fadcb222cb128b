"""Slots that are shared out when all layers of a model have seen a call: budgets that only its data decide, or heads of
other ranks. Pure torch.

In a call of several tokens under such a rule (`ShareOut`) every layer keeps all its candidates, and what ranks
them; `shared_out` drops what is too much and lays the slots out anew. In between each layer holds dense keys and
values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from kvpass.kernels.after_call.compacted import compacted
from kvpass.kernels.attention.observation import Observation
from kvpass.kernels.budget import budget
from kvpass.kernels.exits.record import Merge
from kvpass.kernels.rank.allocate import head_counts, preference_of, ragged_columns
from kvpass.kernels.rank.criterion import INF
from kvpass.kernels.rank.ranking import counts_of_heads, state_scores
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.ranks import gathered, own_part, widest
from kvpass.kernels.rule import Rule
from kvpass.kernels.select_slots import select_slots
from kvpass.kernels.slots.cursor import EXTRA, FREE, LIVE, SEEN
from kvpass.kernels.slots.ragged import laid_out
from kvpass.kernels.slots.state import State
from torch import Tensor


def shared_out(
    states: list[State], rules: list[Rule], spare: int, whole: Tensor | None = None
) -> Iterator[tuple[State, int]]:
    """The states of all layers, one after the other, with what stays, and how many tokens
    each has room for: `spare`, or a few less. Takes the `states` out of their list as it goes, so that one layer at a
    time is held twice.

    Each state is as a call of several tokens leaves it: as many slots for each head, all candidates in use. whole:
    bool [B], rows of which all of them stay; None: no row.
    """
    scores = [state_scores(state, rule) for state, rule in zip(states, rules, strict=True)]
    of_all = [_of_all_ranks(score, rule) for score, rule in zip(scores, rules, strict=True)]
    even = [_even(state, score, rule) for state, score, rule in zip(states, of_all, rules, strict=True)]
    counts = _COUNTS[rules[0][ShareOut].share](of_all, even, states, rules)
    if whole is not None:
        held = [(score > -INF).sum(-1) for score in of_all]
        counts = [torch.where(whole[:, None], *pair) for pair in zip(held, counts, strict=True)]
    extras = _extras(counts, even, rules[0])
    for score, count, extra, rule in zip(scores, counts, extras, rules, strict=True):
        yield _dropped(states.pop(0), score, own_part(count, rule), own_part(extra, rule), spare, rule)


def _of_all_ranks(score: Tensor, rule: Rule) -> Tensor:
    """The scores of all heads of a layer, [B, Hkv of all ranks, C]: as many slots for each, empty ones behind."""
    more = widest(score, rule) - score.shape[2]
    return gathered(torch.nn.functional.pad(score, (0, more), value=-INF) if more else score, rule)


def _even(state: State, score: Tensor, rule: Rule) -> Tensor:
    """The even budget of each head that has a score: int64 [B, H, 1]."""
    size: Tensor = budget(rule, state.cursor[:, :1, SEEN])
    return size[..., None].expand(-1, score.shape[1], -1)


def _by_model(scores: list[Tensor], even: list[Tensor], states: list[State], rules: list[Rule]) -> list[Tensor]:
    """The best slots of all layers stay, whatever layer and head they belong to (Layer-DefensiveKV,
    arXiv 2510.13334). Equal scores: the older, then the lower layer.
    """
    width = max(score.shape[2] for score in scores)
    padded = [torch.nn.functional.pad(score, (width - score.shape[2], 0), value=-INF) for score in scores]
    score = torch.cat(padded, 1)
    counts = head_counts(score, score > -INF, torch.cat(even, 1), rules[0])
    return list(counts.split([one.shape[1] for one in scores], 1))


def _by_preference(scores: list[Tensor], even: list[Tensor], states: list[State], rules: list[Rule]) -> list[Tensor]:
    """Layers share by what their scorer prefers (CAKE, arXiv 2503.12491), on top of the observation window."""
    wanted = torch.stack([preference_of(state.cursor) for state in states], -1).tolist()
    counts = [torch.zeros_like(one[..., 0]) for one in even]
    for row, shares in enumerate(wanted):
        most = [int((score[row] > -INF).sum(-1).max()) for score in scores]
        sizes = layer_sizes(shares, int(even[0][row, 0, 0]), most, rules[0][Observation].window)
        for count, score, size in zip(counts, scores, sizes, strict=True):
            count[row] = (score[row] > -INF).sum(-1).clamp(max=size)
    return counts


def layer_sizes(shares: list[float], even: int, most: list[int], window: int) -> list[int]:
    """Slots for the heads of each layer: `even` on average, at most `most`; what is above the window by `shares`.

    What layers cannot use goes to the others evenly; a remainder goes one by one, to the first layers first.
    """
    base = even - window
    if not sum(shares) > 0 and sum(most) <= even * len(most):  # a call that brought the sequence nothing
        return most
    if base <= 0 or not sum(shares) > 0 or max(most) <= even:
        return [min(even, n) for n in most]
    total, above = base * len(shares), [n - window for n in most]
    sizes = [min(int(share / sum(shares) * total), n) for share, n in zip(shares, above, strict=True)]
    left = min(total, sum(above)) - sum(sizes)
    while left:
        room = [at for at, n in enumerate(above) if sizes[at] < n]
        for at in room[: left or None]:
            more = min(max(left // len(room), 1), above[at] - sizes[at])
            sizes[at] += more
            left -= more
    return [size + window for size in sizes]


def _by_threshold(scores: list[Tensor], even: list[Tensor], states: list[State], rules: list[Rule]) -> list[Tensor]:
    """Each head keeps what scores at least `cut`, and is protected, up to its budget; the best key at least."""
    counts = []
    for score, size, rule in zip(scores, even, rules, strict=True):
        least = (score > -INF).any(-1).long()
        counts.append(torch.minimum((score >= rule[ShareOut].cut).sum(-1).maximum(least), size[..., 0]))
    return counts


def _by_heads(scores: list[Tensor], even: list[Tensor], states: list[State], rules: list[Rule]) -> list[Tensor]:
    """The heads of each layer share its slots, as they do inside of a call where no rank has some of them only."""
    layers = zip(scores, even, rules, strict=True)
    return [counts_of_heads(score, score > -INF, size, rule) for score, size, rule in layers]


def _evenly(scores: list[Tensor], even: list[Tensor], states: list[State], rules: list[Rule]) -> list[Tensor]:
    """Each head keeps its budget."""
    given = zip(scores, even, strict=True)
    return [torch.minimum((score > -INF).sum(-1), size[..., 0]) for score, size in given]


_COUNTS: dict[str, Callable[[list[Tensor], list[Tensor], list[State], list[Rule]], list[Tensor]]] = {
    "model": _by_model,
    "preference": _by_preference,
    "threshold": _by_threshold,
    "heads": _by_heads,
    "even": _evenly,
}


def _extras(counts: list[Tensor], even: list[Tensor], rule: Rule) -> list[Tensor]:
    """EXTRA of each layer, int64 [B, Hkv]: slots above the even budget, for later calls of one token; 0 while no layer
    is above it. Under a threshold the even budget is each head's bound.
    """
    if rule[ShareOut].share == "threshold":
        return [torch.zeros_like(count) for count in counts]
    if rule[ShareOut].share == "heads":
        return [ragged_columns(count, size)[0] for count, size in zip(counts, even, strict=True)]
    above = [count - size[..., 0] for count, size in zip(counts, even, strict=True)]
    bound = torch.cat(above, 1).amax(1, keepdim=True) > 0
    return [torch.where(bound, extra, 0) for extra in above]


def _dropped(state: State, score: Tensor, count: Tensor, extra: Tensor, spare: int, rule: Rule) -> tuple[State, int]:
    """The state with the best `count` keys of each head, and the tokens that it has room for."""
    cursor = state.cursor.clone()
    for column, value in ((LIVE, count), (FREE, count), (EXTRA, extra)):
        cursor[..., column] = value.int()
    cursor, slots, free = laid_out(cursor, spare)
    chosen = select_slots(score, cursor, int(count.max()))
    return compacted(state, score, chosen, cursor, slots, rule, rule[Merge].calls), free
