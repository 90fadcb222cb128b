"""decode_attend in torch where nothing may be read back: what CUDA runs of the rules that Triton does not take.

Fixed shapes, masks instead of ranges, no branch on data, so that a CUDA graph can hold a step. All slots are read,
those not in use too, and all as float32: for rings, latent attention, memory keys and heads wider than 256: a few.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from kvpass.kernels.attention.masks import by_kv_head, visible
from kvpass.kernels.attention.observation import EVEN, Observation, emitted
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.attention.visibility import BEFORE, COUNT, END
from kvpass.kernels.codecs.entries import as_read, encoded
from kvpass.kernels.codecs.storage import coded
from kvpass.kernels.decode_attend.call import Call, Token, lowest
from kvpass.kernels.decode_attend.demote import demote_unread, hold_whole
from kvpass.kernels.decode_attend.device_victim import evict
from kvpass.kernels.decode_attend.slot_entries import read_all
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.bias import BIAS, biased
from kvpass.kernels.slots.cursor import FREE, LIVE, SEEN
from kvpass.kernels.slots.reductions import Slots
from kvpass.kernels.slots.state import State, flat
from kvpass.kernels.slots.statistics import stat
from torch import Tensor

INF = float("inf")


class Here(NamedTuple):
    """The step, on the device."""

    slots: Slots
    now: Tensor
    """int32 [1, 1, 1], the position."""
    arrived: Tensor
    """bool [1 or B, 1, 1], whether the row's token is valid."""
    used: Tensor
    """bool [B, Hkv, C], slots in use, with the token that has arrived."""


def decode_attend_device(token: Token, state: State, call: Call) -> Tensor:
    """See `kvpass.kernels.decode_attend.decode_attend`. That there is room, and what
    `kvpass.kernels.attention.masks.check_shown` says, is asserted by the device."""
    plan, cursor, slots = call.rule.of_steps, state.cursor, Slots(state.cursor, state.slots)
    at = call.at
    now = torch.full((1, 1, 1), call.position, dtype=torch.int32, device=cursor.device)
    now = now if at is None else at.view(1, 1, 1).int()
    arrived = arrived_rows(call, now)
    _check(call, now, state, slots)
    live, free = cursor[..., LIVE, None], cursor[..., FREE, None]
    offset = slots.offset
    used = (offset <= slots.of(live)) & ((offset != slots.of(free)) | slots.of(arrived))
    here = Here(slots, now, arrived, used)
    _append(token, state, here, plan)
    shown, added = _shown(call, state.pos, here)
    if biased(plan):
        own = state[BIAS][:, :, None]
        added = own if added is None else added + own
    queries = as_read(token.q.float(), "k", plan)
    probs = _probabilities(queries, read_all(state, "k", slots, plan), shown, added, slots, call.softmax)
    values = state.k[..., : call.latent].float() if call.latent else read_all(state, "v", slots, plan)
    values = torch.where(used[..., None], values, 0.0)
    out, beside = as_read(slots.mixed(probs, values), "v", plan), call.softmax.beside
    out = out if beside is None else beside.added(out, slots.sum(probs))
    out = out.to(token.q.dtype).reshape(*token.q.shape[:3], values.shape[3])
    if emitted(plan) and plan[Observation].decode != "none":
        _observe(state, probs, shown.any(2) & used, here, plan)
    if plan.demotes:
        demote_unread(state, now, arrived, plan)
    evict(state, slots, used, now, arrived, plan)
    return out


def arrived_rows(call: Call, now: Tensor) -> Tensor:
    """Whether each row's own token is shown to its query in some head: bool [1 or B, 1, 1]."""
    if call.mask is not None:
        wide = call.mask.shape[-1] > 1
        own = call.mask.index_select(-1, now.flatten()) if wide else call.mask
        return visible(own).any(1)
    if call.bounds is None:
        return torch.ones(1, 1, 1, dtype=torch.bool, device=now.device)
    bounds = call.bounds[:, None, :, None]
    return (bounds[:, :, END] == now + 1) & (bounds[:, :, COUNT] > 0)


def _check(call: Call, now: Tensor, state: State, slots: Slots) -> None:
    """Assert that there is room, and that no query is shown what was taken for padding."""
    cursor, past = state.cursor, now.flatten()
    if call.mask is not None:
        shown = visible(call.mask)
        if call.mask.shape[-1] > 1:
            shown = shown & (torch.arange(shown.shape[-1], device=past.device) < past)
            found = shown.sum(-1).flatten(1).amax(1)
        else:
            found = shown.flatten(1).any(1) * past
    else:
        low = lowest(call.sees, past)
        found = past if low is None else past - low
        found = found if call.bounds is None else torch.minimum(call.bounds[:, BEFORE], found)
    torch._assert_async((cursor[:, 0, SEEN] >= found).all(), "the mask shows tokens that were taken for padding")
    room = (cursor[..., LIVE, None] < slots.width).all()
    torch._assert_async(room, "decode_attend: no room for the token, all slots of a head are in use")


def _append(token: Token, state: State, here: Here, plan: Rule) -> None:
    """Write what the token brings into its slots, and what other fields begin with, in the rows where it is valid."""
    slots, cursor = here.slots, state.cursor
    arrive = None if token.arrive is None else token.arrive.unsqueeze(-1)
    brought: dict[str, Any] = {
        "k": token.k,
        "v": token.v,
        "pos": here.now.expand(*cursor.shape[:2], 1),
        "stats": arrive,
    }
    if coded(plan):
        brought |= encoded(token.k, token.v, state, plan)
        valid = here.arrived[:, :, 0].expand(len(token.k), 1)
        hold_whole(token, here.now.flatten(), valid, state, plan)
    places = (slots.first + cursor[..., FREE]).flatten()
    valid = here.arrived.expand(*cursor.shape[:2], 1).reshape(-1)
    for field, tensor in state.per_slot():
        if not tensor.numel():
            continue
        value: Any = brought.get(field.name)
        value = field.fill if value is None else value
        if value is None:
            continue
        target, at = flat(field, tensor), field.rows
        before = target.index_select(at, places)
        new = flat(field, value.contiguous()) if isinstance(value, Tensor) else torch.full_like(before, value)
        behind = [1] * (before.dim() - at - 1)
        target.index_copy_(at, places, torch.where(valid.view(-1, *behind), new, before))


def _shown(call: Call, pos: Tensor, here: Here) -> tuple[Tensor, Tensor | None]:
    """What each query head may see, bool [B, Hkv, 1 or G, C]; and what a float mask adds to the logits, or None."""
    slots, used = here.slots, here.used[:, :, None]
    column = pos.clamp(min=0).long()
    if call.mask is not None:
        grouped = by_kv_head(call.mask, pos.shape[1])[..., 0, :]
        if call.mask.shape[-1] > 1:
            grouped = slots.looked_up(grouped, torch.where(here.used, column, 0))
        else:
            grouped = slots.of(grouped.expand(*pos.shape[:2], *grouped.shape[2:]))
        return visible(grouped) & used, None if call.mask.dtype == torch.bool else grouped.float()
    low = lowest(call.sees, here.now)
    if low is not None:
        used = used & (pos >= low)[:, :, None]
    if call.tokens is not None:
        used = used & slots.looked_up(call.tokens[:, None, None], torch.where(here.used, column, 0))
    return used, None


def _probabilities(q: Tensor, k: Tensor, shown: Tensor, added: Tensor | None, slots: Slots, softmax: Softmax) -> Tensor:
    """float32 [B, Hkv, G, C], 0 where a slot is hidden or empty, all 0 in rows that see nothing."""
    batch, heads = k.shape[:2]
    queries = (q * softmax.factor).reshape(batch, heads, -1, q.shape[3])
    logits = softmax.capped(slots.products(queries, k))
    logits = logits if added is None else logits + added
    logits = torch.where(shown, logits, -INF)
    top = slots.amax(logits)
    sink = softmax.column(heads)
    top = top if sink is None else torch.maximum(top, sink)
    top = torch.where(top > -INF, top, 0.0)
    weights = torch.exp(logits - slots.of(top))
    total = slots.sum(weights)
    total = total if sink is None else total + torch.exp(sink - top)
    return weights / slots.of(torch.where(total > 0, total, 1.0))


def _observe(state: State, probs: Tensor, seen: Tensor, here: Here, plan: Rule) -> None:
    """Update the statistics of the used slots with this query's row, reduced over the group; seen: bool [B, Hkv, C]."""
    slots, mean = here.slots, plan[Observation].group == "mean"
    row = probs.sum(2) * (1.0 / probs.shape[2]) if mean else probs.amax(2)
    names = emitted(plan)
    hit = row
    if {"important", "last"} & set(names):
        hit = row >= slots.of(EVEN / slots.sum(seen).clamp(min=1))
    number = slots.of(state.cursor[..., SEEN, None] + 1.0)
    valid = here.used & slots.of(here.arrived)
    for name in names:
        table = state.stats[stat(plan, name)]
        before = torch.zeros_like(table) if plan[Observation].decode == "replace" else table
        if name == "last":
            after = torch.where(hit, number, before)
        else:
            after = before + {"sum": row, "sumsq": row * row, "count": seen, "important": hit}[name]
        table.copy_(torch.where(valid, after, table))
