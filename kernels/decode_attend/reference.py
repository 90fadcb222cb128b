"""Reference of decode_attend in torch: the meaning, and the CPU path.

Called once per layer and token, so it counts torch calls: the usual step (every head holds the same number of
slots, no mask) takes plain numbers from the cursor; ragged counts, masks and padding rows take longer roads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..masks import additive, at_positions, by_kv_head, visible
from ..rule import FIRST, FREE, LIVE, SEEN, UNTOUCHABLE, Rule
from ..scores import INF, deviations, slot_scores, untouchable


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
) -> Tensor:
    """See `kvpass.kernels.decode_attend.decode_attend`."""
    plan = Rule.parse(rule)
    state = State(k, v, pos, stats, cursor)
    if mask is not None:
        own = mask if mask.shape[-1] == 1 else mask[..., position : position + 1]
        arrived = visible(own).any(1).flatten().tolist()
        if not all(arrived):
            return _with_padding(q, k_new, v_new, mask, state, position, scale, rule, arrived * (len(q) // len(arrived)))
    step = _Step.read(cursor, position, plan)
    _append(state, k_new, v_new, position)
    used = state.narrow(step.slots)
    observes = bool(plan.stats) and plan.decode != "none"
    out, row, seen = _attend(q, used, mask, step, scale, plan.group if observes else None)
    if observes:
        _observe(used.stats, row, seen, step, plan)
    _settle(state, used, step, plan)
    return out


@dataclass(frozen=True)
class State:
    """The five state tensors of one site."""

    k: Tensor
    v: Tensor
    pos: Tensor
    stats: Tensor
    cursor: Tensor

    def narrow(self, slots: int) -> State:
        """Views of the first slots."""
        return State(
            self.k[:, :, :slots], self.v[:, :, :slots], self.pos[..., :slots], self.stats[..., :slots], self.cursor
        )

    def row(self, b: int) -> State:
        """Views of one batch row."""
        one = slice(b, b + 1)
        return State(self.k[one], self.v[one], self.pos[one], self.stats[:, one], self.cursor[one])


@dataclass(frozen=True)
class _Step:
    """The step in numbers: ints where all heads agree, else int64 tensors [B, Hkv, 1]."""

    slots: int
    """Slots in use in the fullest head, the new token included."""
    common: int
    """Slots in use in every head."""
    empty: Tensor | None
    """Bool [B, Hkv, slots]: where ragged heads have nothing; None if all heads are equally full."""
    size: int | Tensor
    """Budget."""
    first: int | Tensor
    evicts: bool | Tensor
    """Whether a slot must go."""
    starts: bool
    """Whether this is some row's first valid token."""
    position: int

    @staticmethod
    def read(cursor: Tensor, position: int, plan: Rule) -> _Step:
        heads = cursor.view(-1, 4).tolist()
        sizes = [plan.budget(c[SEEN] + 1) for c in heads]
        live = [c[LIVE] + 1 for c in heads]
        first = [c[FIRST] if c[FIRST] >= 0 else position for c in heads]
        starts = any(c[FIRST] < 0 for c in heads)
        low, high = min(live), max(live)
        if low == high and min(sizes) == max(sizes) and min(first) == max(first):
            return _Step(high, high, None, sizes[0], first[0], high > sizes[0], starts, position)

        def shaped(x: list[int]) -> Tensor:
            return torch.tensor(x, device=cursor.device).view(*cursor.shape[:2], 1)

        size, used = shaped(sizes), shaped(live)
        empty = torch.arange(high, device=cursor.device) >= used if low < high else None
        over = used > size
        evicts: bool | Tensor = over if over.any() else False
        return _Step(high, low, empty, size, shaped(first), evicts, starts, position)


def _append(state: State, k_new: Tensor, v_new: Tensor, position: int) -> None:
    """Write the token into slot FREE of every head."""
    slot = state.cursor[..., FREE, None].long()
    state.k.scatter_(2, slot[..., None].expand_as(k_new), k_new)
    state.v.scatter_(2, slot[..., None].expand_as(v_new), v_new)
    state.pos.scatter_(2, slot, position)
    if state.stats.shape[0]:
        state.stats.scatter_(3, slot.expand(state.stats.shape[0], *slot.shape), 0.0)


def _attend(
    q: Tensor, used: State, mask: Tensor | None, step: _Step, scale: float, group: str | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention over the used slots: (out, row reduced over the group if asked for, visible slots if masked)."""
    batch, heads, slots, dim = used.k.shape
    flat = batch * heads
    keys = used.k.reshape(flat, slots, dim).float()
    queries = (q.float() * scale).view(flat, -1, dim)
    logits = torch.bmm(queries, keys.transpose(1, 2))
    if step.empty is not None:
        logits.masked_fill_(step.empty.view(flat, 1, slots), -INF)
    if mask is None:
        probs, seen = logits.softmax(-1), None
    else:
        probs, seen = _masked_softmax(logits.view(batch, heads, -1, slots), mask, used.pos, step.empty)
        probs = probs.view(flat, -1, slots)
    out = _mix(probs, used.v, step).to(q.dtype).view(*q.shape[:3], used.v.shape[-1])
    row = probs if group is None else probs.mean(1) if group == "mean" else probs.amax(1)
    return out, row.view(batch, heads, -1, slots).squeeze(2), seen


def _masked_softmax(logits: Tensor, mask: Tensor, pos: Tensor, empty: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over the slots that the mask shows, and which slots some query head of the group sees.

    logits [B, Hkv, G, n] -> probabilities of that shape (0 in rows that see nothing), bool [B, Hkv, n].
    """
    heads = logits.shape[1]
    here = at_positions(by_kv_head(mask, heads), pos).squeeze(3)
    shown = visible(here)
    if empty is not None:
        shown = shown & ~empty.unsqueeze(2)
    if mask.dtype != torch.bool:
        logits = logits + additive(here, torch.float32)
    probs = logits.masked_fill(~shown, -INF).softmax(-1)
    probs = probs.masked_fill_(~shown.any(-1, keepdim=True), 0.0)
    return probs, shown.any(2).expand(logits.shape[0], heads, logits.shape[3])


def _mix(probs: Tensor, v: Tensor, step: _Step) -> Tensor:
    """probs [B*Hkv, G, n] @ v [B, Hkv, n, Dv] in float32. Undefined values of empty slots never enter a product."""
    values = v.reshape(probs.shape[0], *v.shape[2:])
    if step.empty is None:
        return torch.bmm(probs, values.float())
    common = step.common
    out = torch.bmm(probs[..., :common], values[:, :common].float())
    hole = step.empty[..., common:].reshape(probs.shape[0], -1, 1)
    tail = values[:, common:].float().masked_fill(hole, 0.0)  # only the ragged tail is copied
    return out.baddbmm_(probs[..., common:], tail)


def _observe(stats: Tensor, row: Tensor, seen: Tensor | None, step: _Step, plan: Rule) -> None:
    """Update the statistics of the used slots in place from the row [B, Hkv, n] of this query."""
    for index, name in enumerate(plan.stats):
        if name == "count":
            value = _counted(row, seen, step)
        else:
            value = row if name == "sum" else row * row
        if plan.decode == "add":
            stats[index].add_(value)
        elif step.empty is None:
            stats[index].copy_(value)
        else:
            stats[index].copy_(torch.where(step.empty, stats[index], value))


def _counted(row: Tensor, seen: Tensor | None, step: _Step) -> Tensor:
    """1 where the query may see the slot."""
    count = torch.ones_like(row) if seen is None else seen.float()
    return count if step.empty is None else count.masked_fill(step.empty, 0.0)


def _settle(state: State, used: State, step: _Step, plan: Rule) -> None:
    """Advance the cursor; if over budget, evict one slot per head and leave the hole at FREE."""
    live, free, seen, first = state.cursor.unbind(-1)
    seen.add_(1)
    if step.starts:
        first.masked_fill_(first < 0, step.position)
    if step.evicts is False:
        live.add_(1)
        free.copy_(live)
        return
    victim = _victim(used, step, plan)
    if isinstance(step.evicts, Tensor):
        live.add_(~step.evicts[..., 0])
        free.copy_(torch.where(step.evicts, victim, live[..., None])[..., 0])
        used.pos.scatter_(2, victim, torch.where(step.evicts, -1, used.pos.gather(2, victim)))
    else:
        free.copy_(victim[..., 0])
        used.pos.scatter_(2, victim, -1)


def _victim(used: State, step: _Step, plan: Rule) -> Tensor:
    """The slot each head gives up: int64 [B, Hkv, 1]. Lowest unprotected score, ties evict the newer."""
    pos = used.pos
    score = slot_scores(used.stats, pos, plan)
    if plan.heads == "all" and plan.score != "position":
        score = score.mean(1, keepdim=True).expand_as(pos)
    recent = plan.recent + step.size * plan.recent_num // plan.recent_den
    protected = pos > step.position - recent
    if plan.sinks:
        protected |= pos < step.first + plan.sinks
    if plan.scope_num:
        kept = None if step.empty is None else ~step.empty
        reach = step.size * plan.scope_num // plan.scope_den + 1
        scope = untouchable(deviations(used.stats, plan), pos, protected, kept, reach)
        score = score.masked_fill(scope, UNTOUCHABLE)
    score = score.masked_fill(protected if step.empty is None else protected | step.empty, INF)
    lowest = score == score.amin(-1, keepdim=True)
    if step.empty is not None:
        lowest &= ~step.empty
    return torch.where(lowest, pos, -1).argmax(-1, keepdim=True)


def _with_padding(
    q: Tensor, k_new: Tensor, v_new: Tensor, mask: Tensor, state: State, position: int, scale: float, rule: str, arrived: list[bool]
) -> Tensor:
    """Some rows carry a pad token: one row at a time, pad rows only look."""
    outs = []
    for b, real in enumerate(arrived):
        one, row = slice(b, b + 1), state.row(b)
        seen = mask if mask.shape[0] == 1 else mask[one]
        if real:
            tensors = (q[one], k_new[one], v_new[one], seen, row.k, row.v, row.pos, row.stats, row.cursor)
            outs.append(decode_attend_reference(*tensors, position, scale, rule))
        else:
            outs.append(_look(q[one], seen, row, scale))
    return torch.cat(outs)


def _look(q: Tensor, mask: Tensor, row: State, scale: float) -> Tensor:
    """Attention of a pad token over one row's used slots; the state stays as it is."""
    cursor = row.cursor[0]
    slot = torch.arange(row.pos.shape[-1], device=q.device)
    used = (slot <= cursor[:, LIVE, None]) & (slot != cursor[:, FREE, None])
    keys = row.k[0].float().masked_fill(~used[..., None], 0.0)
    values = row.v[0].float().masked_fill(~used[..., None], 0.0)
    queries = (q.float() * scale).view(1, len(cursor), -1, q.shape[-1])
    probs, _ = _masked_softmax(queries @ keys.transpose(-1, -2), mask, row.pos, ~used[None])
    return (probs @ values).to(q.dtype).view(*q.shape[:3], values.shape[-1])
