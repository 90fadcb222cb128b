"""Rings of slots: old tokens thin out instead of leaving all at once (Cascading KV cache, arXiv 2406.17808).

After the sinks come `Rings.rings` rings of equal size. Every token enters ring 0; ring i takes every 2**i-th token, and
what it takes drives out its oldest, which goes on to ring i + 1. A token that is not taken duels with the ring's newest
for its slot, by score. While slots are free every ring takes what comes. A statistic of the slots says which ring each
is in; nothing moves in memory.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from kvpass.kernels.rank.places import Protected
from kvpass.kernels.rule import Record, Rule
from kvpass.kernels.slots.cursor import SEEN
from torch import Tensor

RING = "ring"
"""A slot's statistic: the ring that it is in."""


@dataclass(frozen=True)
class Rings(Record):
    """So many rings of equal size; 0: none."""

    rings: int = 0

    def resized(self, size: Any, rule: Rule) -> Any:
        """What is left beside the sinks is divided by the rings."""
        return size - (size - rule[Protected].sinks) % self.rings


SINK, NOWHERE = -1.0, -2.0
"""Rings of sinks, and of a token that has not entered."""


def takes(ring: int, tokens: Tensor | int, room: Tensor | int, rule: Rule) -> Tensor | bool:
    """Whether a ring takes what comes, when `tokens` have come and rings have `room` slots each."""
    before = tokens - 1
    turn: Tensor | bool = (before - rule[Protected].sinks) % (1 << ring) == 0
    return turn | (before <= room * rule[Rings].rings + rule[Protected].sinks)


def ringed(
    score: Tensor, rings: Tensor, candidate: Tensor, new: int, size: Tensor, cursor: Tensor, rule: Rule
) -> Tensor:
    """Let the last `new` keys enter one by one: which keys stay, bool [B, Hkv, L]; changes `rings` of those.

    score, rings float32 and candidate bool [B, Hkv, L], past keys and then the call's, each by position; size int64
    [B, Hkv, 1], the budget after the call; cursor: before it.
    """
    stay = torch.zeros_like(candidate)
    length = score.shape[2]
    for b in range(len(score)):
        for h in range(score.shape[1]):
            alive = candidate[b, h].nonzero().flatten().tolist()
            past = [at for at in alive if at < length - new]
            held = dict(zip(past, rings[b, h, past].tolist(), strict=True)) if past else {}
            room = (int(size[b, h]) - rule[Protected].sinks) // rule[Rings].rings
            after = _entered(held, alive[len(past) :], score[b, h].tolist(), int(cursor[b, h, SEEN]), room, rule)
            where = torch.tensor(list(after), dtype=torch.int64, device=score.device)
            stay[b, h, where] = True
            rings[b, h, where] = torch.tensor(list(after.values()), device=score.device)
    return stay


def _entered(
    held: dict[int, float], new: list[int], score: list[float], tokens: int, room: int, rule: Rule
) -> dict[int, float]:
    """Ring of each key that stays in one head."""
    rings: list[deque[int]] = [deque(k for k, at in held.items() if at == i) for i in range(rule[Rings].rings)]
    sinks = [k for k, at in held.items() if at == SINK]
    for key in new:
        tokens += 1
        if len(sinks) < rule[Protected].sinks:
            sinks.append(key)
            continue
        for i, ring in enumerate(rings):
            if takes(i, tokens, room, rule):
                ring.append(key)
                if len(ring) <= room:
                    break
                key = ring.popleft()
            elif not ring:
                ring.append(key)
                break
            else:
                if score[key] >= score[ring[-1]]:
                    ring[-1] = key
                break
    return {**dict.fromkeys(sinks, SINK), **{k: float(i) for i, ring in enumerate(rings) for k in ring}}


def enter(
    pos: Tensor, score: Tensor, rings: Tensor, slot: Tensor, tokens: Tensor, room: Tensor | int, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Let the token in `slot` enter: the slot that it drives out, int64 [B, Hkv, 1], and whether it drives out any.

    pos int32, score and rings float32 [B, Hkv, n], the last changed in place; tokens int [B, Hkv, 1], this one too.
    """
    coming, victim = slot, slot
    pending = tokens > rule[Protected].sinks
    rings.scatter_(2, slot, torch.where(pending, NOWHERE, SINK))
    evicts = torch.zeros_like(pending)
    for i in range(rule[Rings].rings):
        member = (rings == i) & (pos >= 0)
        count = member.sum(-1, keepdim=True)
        newest = torch.where(member, pos, -1).argmax(-1, keepdim=True)
        oldest = torch.where(member, pos, 2**31 - 1).argmin(-1, keepdim=True)
        taken = torch.as_tensor(takes(i, tokens, room, rule), device=pos.device)
        duel = pending & ~taken & (count > 0)
        won = duel & (score.gather(2, coming) >= score.gather(2, newest))
        inside = (pending & ~duel) | won
        rings.scatter_(2, coming, torch.where(inside, float(i), rings.gather(2, coming)))
        victim = torch.where(duel, torch.where(won, newest, coming), victim)
        evicts = evicts | duel
        pending = pending & taken & (count >= room)
        coming = torch.where(pending, oldest, coming)
    return torch.where(pending, coming, victim), evicts | pending
