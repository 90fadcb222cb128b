"""Reference of decode_attend in torch: the meaning, and the CPU path.

Called once per layer and token, so it counts torch calls: what the cursor says is read once into Python numbers, bool
masks that hide no live slot are dropped, and rare cases (ties, padding, hidden slots) take longer roads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from kvpass.kernels.decode_attend.look import look
from kvpass.kernels.masks import additive, at_positions, by_kv_head, check_shown, shows_padding, visible
from kvpass.kernels.rule import FIRST, FREE, LIVE, SEEN, UNTOUCHABLE, Rule
from kvpass.kernels.scores import INF, deviations, slot_scores, untouchable
from kvpass.kernels.softmax import Softmax
from torch import Tensor


def decode_attend_reference(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    mask: Tensor | None,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    stats: Tensor,
    cursor: Tensor,
    position: int,
    scale: float,
    rule: str,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    latent: int = 0,
) -> Tensor:
    """See `kvpass.kernels.decode_attend.decode_attend`."""
    plan, softmax = Rule.parse(rule), Softmax(scale, sinks, softcap)
    cells = cursor.view(-1, 4).tolist()
    if mask is None and any(c[SEEN] < position for c in cells[:: k.shape[1]]):
        raise shows_padding()
    if mask is not None and _hides_nothing(mask, cells, position):
        mask = None
    if mask is not None:
        check_shown(mask, cursor[:, 0, SEEN], position)
        arrived = _arrived(mask, position, len(q))
        if not all(arrived):
            state = (k, v, pos, stats, cursor)
            return _with_padding(q, k_new, v_new, mask, state, position, softmax, rule, latent, arrived)
    step = _read(cells, cursor, position, plan)
    _append(cells, k_new, v_new, k, v, pos, stats, position)
    used = pos[..., : step.slots]
    probs, seen = _probabilities(q, k, mask, used, step, softmax)
    if plan.stats and plan.decode != "none":
        _observe(stats, probs, seen, step, plan)
    values = k[..., :latent] if latent else v
    out = _mix(probs, values, step).to(q.dtype).view(*q.shape[:3], values.shape[3])
    _settle(used, stats[..., : step.slots], cursor, step, plan)
    return out


class _Step(NamedTuple):
    """One step in numbers. Ints where all heads agree, else int64 or bool tensors [B, Hkv, 1]."""

    slots: int
    """Slots in use in the fullest head, the new token's included."""
    runs: list[tuple[int, int, int]]
    """(start, stop, slots): neighbouring heads of the flattened [B * Hkv] with equally many slots in use."""
    size: int | Tensor
    """Budget."""
    first: int | Tensor
    evicts: bool | Tensor
    """Whether a slot must go."""
    starts: bool
    """Whether this is the first valid token of some row."""
    position: int


def _read(cells: list[list[int]], cursor: Tensor, position: int, plan: Rule) -> _Step:
    live, _, seen, first = cells[0]
    starts = any(c[FIRST] < 0 for c in cells)
    if not starts and all(c[LIVE] == live and c[SEEN] == seen and c[FIRST] == first for c in cells):
        size = plan.budget(seen + 1)
        return _Step(live + 1, [(0, len(cells), live + 1)], size, first, live + 1 > size, False, position)

    def shaped(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=cursor.device).view(*cursor.shape[:2], 1)

    used = [c[LIVE] + 1 for c in cells]
    sizes = [plan.budget(c[SEEN] + 1) for c in cells]
    runs, start = [], 0
    for slots, same in groupby(used):
        stop = start + len(list(same))
        runs.append((start, stop, slots))
        start = stop
    over = [u > s for u, s in zip(used, sizes, strict=True)]
    evicts = over[0] if all(o == over[0] for o in over) else shaped(over)
    firsts = [c[FIRST] if c[FIRST] >= 0 else position for c in cells]
    return _Step(max(used), runs, shaped(sizes), shaped(firsts), evicts, starts, position)


def _hides_nothing(mask: Tensor, cells: list[list[int]], position: int) -> bool:
    """Whether a bool mask is plain left padding, which hides no slot: pads never got one.

    Exact for what it accepts: each row is true from some column at or before the row's first valid token on. Raises
    MaskError if that shows more columns than tokens were seen (`check_shown`).
    """
    if mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[3] <= position:
        return False
    rows = mask[..., : position + 1].reshape(mask.shape[0], -1).view(torch.uint8)
    starts, counts = rows.argmax(-1).tolist(), rows.sum(-1).tolist()
    share = len(cells) // len(starts)
    for i, (start, count) in enumerate(zip(starts, counts, strict=True)):
        here = cells[i * share : (i + 1) * share]
        if count != position + 1 - start or start > min(c[FIRST] if c[FIRST] >= 0 else position for c in here):
            return False
        if position - start > min(c[SEEN] for c in here):
            raise shows_padding()
    return True


def _arrived(mask: Tensor, position: int, batch: int) -> list[bool]:
    """Per batch row: is the token valid, that is, visible to its own query in some head."""
    own = mask if mask.shape[-1] == 1 else mask[..., position : position + 1]
    found: list[bool] = visible(own).any(1).expand(batch, 1, 1).flatten().tolist()
    return found


def _append(
    cells: list[list[int]],
    k_new: Tensor,
    v_new: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    stats: Tensor,
    position: int,
) -> None:
    """Write the token into slot FREE of every head. State tensors are contiguous, so a slot is one row of a matrix."""
    slots = k.shape[2]
    rows = torch.tensor([i * slots + c[FREE] for i, c in enumerate(cells)], device=k.device)
    k.view(-1, k.shape[3]).index_copy_(0, rows, k_new.reshape(-1, k.shape[3]))
    if v.shape[3]:
        v.view(-1, v.shape[3]).index_copy_(0, rows, v_new.reshape(-1, v.shape[3]))
    pos.view(-1).index_fill_(0, rows, position)
    if stats.shape[0]:
        stats.view(stats.shape[0], -1).index_fill_(1, rows, 0.0)


def _probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, pos: Tensor, step: _Step, softmax: Softmax
) -> tuple[Tensor, Tensor | None]:
    """float32 [B*Hkv, G, n], 0 on empty slots; and if masked bool [B*Hkv, n], what some query of the group sees."""
    keys = k.view(-1, *k.shape[2:])
    queries = q.reshape(keys.shape[0], -1, q.shape[3])
    if len(step.runs) == 1:
        logits = _logits(queries, keys[:, : step.slots], softmax)
    else:  # a run of heads at a time: undefined keys of empty slots are not read
        logits = torch.full((*queries.shape[:2], step.slots), -INF, device=q.device)
        for start, stop, slots in step.runs:
            logits[start:stop, :, :slots] = _logits(queries[start:stop], keys[start:stop, :slots], softmax)
    if mask is None:
        return softmax.probabilities(logits), None
    return _masked_softmax(logits, mask, pos, softmax)


def _logits(q: Tensor, k: Tensor, softmax: Softmax) -> Tensor:
    unused = q.new_empty(1, dtype=torch.float32)
    return softmax.capped(torch.baddbmm(unused, q.float(), k.float().mT, beta=0, alpha=softmax.factor))


def _masked_softmax(logits: Tensor, mask: Tensor, pos: Tensor, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """Softmax over what the mask shows: probabilities (0 in rows that see nothing), and what any of the group sees."""
    batch, heads, slots = pos.shape
    here = at_positions(by_kv_head(mask, heads), pos).squeeze(3)
    shown = visible(here) & (pos >= 0).unsqueeze(2)
    logits = logits.view(batch, heads, -1, slots)
    if mask.dtype != torch.bool:
        logits = logits + additive(here, torch.float32)
    probs = softmax.probabilities(logits.masked_fill(~shown, -INF))
    probs = probs.masked_fill_(~shown.any(-1, keepdim=True), 0.0)
    return probs.flatten(0, 1), shown.any(2).expand(pos.shape).flatten(0, 1)


def _mix(probs: Tensor, v: Tensor, step: _Step) -> Tensor:
    """probs [B*Hkv, G, n] @ v in float32. Undefined values of empty slots never enter a product."""
    values = v.view(-1, *v.shape[2:])
    parts = [torch.bmm(probs[a:b, :, :n], values[a:b, :n].float()) for a, b, n in step.runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _observe(stats: Tensor, probs: Tensor, seen: Tensor | None, step: _Step, plan: Rule) -> None:
    """Update the statistics of the used slots in place with this query's row, reduced over the group."""
    mean = plan.group == "mean"
    row = probs.sum(1) if mean else probs.amax(1)
    weight = 1.0 / probs.shape[1] if mean else 1.0  # the mean's division rides along in the update
    for index, name in enumerate(plan.stats):
        table = stats[index].view(row.shape[0], -1)
        for start, stop, slots in step.runs:
            target, part = table[start:stop, :slots], row[start:stop, :slots]
            shown = None if seen is None else seen[start:stop, :slots]
            if plan.decode == "replace":
                target.zero_()
            if name == "sum":
                target.add_(part, alpha=weight)
            elif name == "sumsq":
                target.addcmul_(part, part, value=weight * weight)
            else:
                target.add_(1.0 if shown is None else shown)


def _settle(pos: Tensor, stats: Tensor, cursor: Tensor, step: _Step, plan: Rule) -> None:
    """Advance the cursor; if over budget, evict one slot per head, leave the hole at FREE. pos, stats: used slots."""
    cursor[..., SEEN].add_(1)
    if step.starts:
        cursor[..., FIRST].masked_fill_(cursor[..., FIRST] < 0, step.position)
    if step.evicts is False:
        cursor[..., : FREE + 1] = cursor[..., LIVE, None] + 1
        return
    victim = _victim(pos, stats, step, plan)
    if step.evicts is True:
        cursor[..., FREE : FREE + 1] = victim
        pos.scatter_(2, victim, -1)
        return
    live = cursor[..., LIVE, None] + ~step.evicts
    cursor[..., LIVE, None] = live
    cursor[..., FREE, None] = torch.where(step.evicts, victim, live).int()
    pos.scatter_(2, victim, torch.where(step.evicts, -1, pos.gather(2, victim)))


def _victim(pos: Tensor, stats: Tensor, step: _Step, plan: Rule) -> Tensor:
    """The slot each head gives up: int64 [B, Hkv, 1]. Lowest unprotected score, ties evict the newer.

    torch's where and masked_fill are slow on CPU, so protection is arithmetic: `guard` is 0 for slots that may go, at
    least 3e38 for the others (empties, at position -1, among them), and no score is negative.
    """
    score = slot_scores(stats, pos, plan)
    if plan.heads == "all" and plan.score != "position":
        score = score.mean(1, keepdim=True).expand_as(pos)
    low, high = _exposed(step, plan)
    outside = pos - pos.clamp(low, high)  # type: ignore[arg-type]  # both ints or both tensors
    guard = outside.float().abs_().mul_(UNTOUCHABLE)
    scope = _scope(stats, pos, guard, step, plan) if plan.scope_num else None
    eligible = score if scope is None else torch.add(score, scope, alpha=UNTOUCHABLE)
    lowest, victim = torch.maximum(eligible, guard).topk(2, -1, largest=False)
    if all(a < b and a < UNTOUCHABLE for a, b in lowest.view(-1, 2).tolist()):
        return victim[..., :1]
    if scope is not None:
        score = score.masked_fill(scope, UNTOUCHABLE)
    score = score.masked_fill(outside != 0, INF)
    return torch.where(score == score.amin(-1, keepdim=True), pos, -1).argmax(-1, keepdim=True)


def _exposed(step: _Step, plan: Rule) -> tuple[int | Tensor, int | Tensor]:
    """First and last position that may be evicted: after the sinks, before the recent window; (.., -2) if none may."""
    low = step.first + plan.sinks
    high = step.position - plan.recent - step.size * plan.recent_num // plan.recent_den
    if isinstance(low, Tensor):
        return low, torch.where(low > high, -2, high)
    return low, -2 if low > high else high


def _scope(stats: Tensor, pos: Tensor, guard: Tensor, step: _Step, plan: Rule) -> Tensor:
    """Slots that the scope keeps out of reach: bool, the shape of pos."""
    spread = torch.maximum(deviations(stats, plan), guard)
    if len(step.runs) > 1:
        spread = spread.masked_fill(pos < 0, -INF)
    return untouchable(spread, pos, step.size * plan.scope_num // plan.scope_den + 1)


def _with_padding(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    mask: Tensor,
    state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    position: int,
    softmax: Softmax,
    rule: str,
    latent: int,
    arrived: list[bool],
) -> Tensor:
    """Some rows carry a pad token: one row at a time, pad rows only look."""
    k, v, pos, stats, cursor = state
    outs = []
    for b, real in enumerate(arrived):
        one = slice(b, b + 1)
        seen = mask if mask.shape[0] == 1 else mask[one]
        if real:
            row = (k[one], v[one], pos[one], stats[:, one], cursor[one])
            new, (scale, sinks, softcap) = (q[one], k_new[one], v_new[one]), softmax
            outs.append(decode_attend_reference(*new, seen, *row, position, scale, rule, sinks, softcap, latent))
        else:
            values = k[one, ..., :latent] if latent else v[one]
            outs.append(look(q[one], seen, k[one], values, pos[one], cursor[one], softmax))
    return torch.cat(outs)
