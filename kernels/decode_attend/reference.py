"""Reference of decode_attend in torch: the meaning, and the CPU path.

Called once per layer and token, so it counts torch calls: what the cursor says is read once into Python numbers, bool
masks that hide no live slot are dropped, and rare cases (ties, padding, hidden slots) take longer roads.
"""

from __future__ import annotations

from typing import Any

import torch
from kvpass.kernels.attention.masks import check_shown, count_shown, shows_padding, visible
from kvpass.kernels.attention.observation import EVEN, Observation, emitted
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.codecs.entries import encoded
from kvpass.kernels.codecs.storage import coded
from kvpass.kernels.codecs.whole import keep_newest
from kvpass.kernels.decode_attend.attend_only import attend_only, seen_slots
from kvpass.kernels.decode_attend.call import Call, Token
from kvpass.kernels.decode_attend.copies import Copies, copies_of
from kvpass.kernels.decode_attend.demote import demote, hold_whole
from kvpass.kernels.decode_attend.slot_entries import mixed, products
from kvpass.kernels.decode_attend.step import HeadRange, StepFacts, step_facts
from kvpass.kernels.decode_attend.victim import evict_one, used_positions
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.bias import biased, used_biases
from kvpass.kernels.slots.cursor import FIRST, SEEN
from kvpass.kernels.slots.moves import put_row, row_of
from kvpass.kernels.slots.ragged import columns
from kvpass.kernels.slots.state import State, flat
from kvpass.kernels.slots.statistics import stat
from torch import Tensor

INF = float("inf")


def decode_attend_reference(token: Token, state: State, call: Call) -> Tensor:
    """See `kvpass.kernels.decode_attend.decode_attend`."""
    plan, mask, position = call.rule.of_steps, call.mask, call.position
    cells = state.cursor.view(-1, columns(plan)).tolist()
    if mask is None:
        arrived, hides = _by_bounds(call, cells, len(token.q))
    elif _hides_nothing(mask, cells, position):
        arrived, hides = [True], False
    else:
        check_shown(count_shown(mask, position), state.cursor[:, 0, SEEN])
        arrived, hides = _arrived(mask, position, len(token.q)), True
    if not all(arrived):
        return _with_padding(token, state, call, arrived)
    facts = step_facts(cells, state, position, plan)
    _append(token, state, facts, plan)
    copies = [copies_of(state, heads, facts, plan) for heads in facts.ranges]
    probs, seen = _probabilities(token.q, state, copies, hides, facts, call)
    if emitted(plan) and plan[Observation].decode != "none":
        _observe(state.stats, probs, seen, facts, plan)
    out, beside = _mix(probs, state, copies, facts, call), call.softmax.beside
    out = out if beside is None else beside.added(out, probs.sum(-1, keepdim=True))
    out = out.to(token.q.dtype).view(*token.q.shape[:3], out.shape[2])
    if plan.demotes:
        demote(state, facts, plan)
    evict_one(state, facts, plan)
    return out


def _by_bounds(call: Call, cells: list[list[int]], batch: int) -> tuple[list[bool], bool]:
    """Per batch row, is the token valid; and whether words and tokens hide slots. Raises MaskError if they show columns
    that never got one.
    """
    position, low = call.position, call.low
    share, bounds = len(cells) // batch, None if call.bounds is None else call.bounds.tolist()
    arrived, hides = [], False
    for b in range(batch):
        here = cells[b * share : (b + 1) * share]
        first, end, before, count = (0, position + 1, position, 1) if bounds is None else bounds[b % len(bounds)]
        if min(before, position - low) > here[0][SEEN]:
            raise shows_padding()
        arrived.append(end == position + 1 and count > 0)
        begin = min(c[FIRST] if c[FIRST] >= 0 else position for c in here)
        apart = before == 0 or first > begin or before != position - first
        hides = hides or (begin < position and (low > begin or apart))
    return arrived, hides


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


def _append(token: Token, state: State, facts: StepFacts, plan: Rule) -> None:
    """Write what the token brings into its slots, and what other fields begin with."""
    arrive = None if token.arrive is None else token.arrive.unsqueeze(-1)
    brought: dict[str, Any] = {"k": token.k, "v": token.v, "pos": facts.position, "stats": arrive}
    if coded(plan):
        brought |= encoded(token.k, token.v, state, plan)
        _keep_whole(token, state, facts, plan)
    for field, tensor in state.per_slot():
        if not tensor.numel():
            continue
        value = brought.get(field.name)
        value = field.fill if value is None else value
        target, at = flat(field, tensor), field.rows
        if isinstance(value, Tensor):
            target.index_copy_(at, facts.rows, flat(field, value.contiguous()))
        elif isinstance(value, (int, float)):
            target.index_fill_(at, facts.rows, value)


def _keep_whole(token: Token, state: State, facts: StepFacts, plan: Rule) -> None:
    if isinstance(facts.number, int) and not plan.demotes:
        keep_newest(token.k, token.v, facts.position, facts.number, state, plan)
        return
    pos = torch.full((1,), facts.position, dtype=torch.int32, device=token.k.device)
    valid = torch.ones(len(token.k), 1, dtype=torch.bool, device=token.k.device)
    hold_whole(token, pos, valid, state, plan)


def _probabilities(
    q: Tensor, state: State, copies: list[Copies | None], hides: bool, step: StepFacts, call: Call
) -> tuple[Tensor, Tensor | None]:
    """float32 [B*Hkv, G, n], 0 on empty slots; and if some are hidden bool [B*Hkv, n], what some query of the group
    sees.
    """
    rule, softmax = call.rule, call.softmax
    queries = q.reshape(state.k.shape[0] * state.k.shape[1], -1, q.shape[3]).float()
    if len(step.ranges) == 1:
        logits = softmax.capped(products(queries, softmax.factor, state, step.ranges[0], copies[0], rule))
    else:  # some heads at a time: undefined keys of empty slots are not read
        logits = torch.full((*queries.shape[:2], step.slots), -INF, device=q.device)
        for heads, own in zip(step.ranges, copies, strict=True):
            part = products(queries[heads.first : heads.last], softmax.factor, state, heads, own, rule)
            logits[heads.first : heads.last, :, : heads.slots] = softmax.capped(part)
    if biased(rule):
        logits = logits + used_biases(state, step.slots).flatten(0, 1)[:, None]
    if not hides:
        return softmax.probabilities(logits), None
    return _masked_softmax(logits, call, used_positions(state, step), softmax)


def _masked_softmax(logits: Tensor, call: Call, pos: Tensor, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """Softmax over what is shown: probabilities (0 in rows that see nothing), and what any of the group sees."""
    batch, heads, slots = pos.shape
    shown, added = seen_slots(call, pos)
    logits = logits.view(batch, heads, -1, slots)
    logits = logits if added is None else logits + added
    probs = softmax.probabilities(logits.masked_fill(~shown, -INF))
    probs = probs.masked_fill_(~shown.any(-1, keepdim=True), 0.0)
    return probs.flatten(0, 1), shown.any(2).expand(pos.shape).flatten(0, 1)


def _mix(probs: Tensor, state: State, copies: list[Copies | None], step: StepFacts, call: Call) -> Tensor:
    """probs [B*Hkv, G, n] @ values in float32. Undefined values of empty slots never enter a product."""
    both = zip(step.ranges, copies, strict=True)
    parts = [_mixed(probs[r.first : r.last, :, : r.slots], state, r, own, call) for r, own in both]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _mixed(probs: Tensor, state: State, heads: HeadRange, copies: Copies | None, call: Call) -> Tensor:
    if call.latent:
        return torch.bmm(probs, heads.rows(state.k[..., : call.latent]).float())
    return mixed(probs, state, heads, copies, call.rule)


def _observe(stats: Tensor, probs: Tensor, seen: Tensor | None, step: StepFacts, plan: Rule) -> None:
    """Update the statistics of the used slots in place with this query's row, reduced over the group."""
    mean = plan[Observation].group == "mean"
    row = probs.sum(1) if mean else probs.amax(1)
    weight = 1.0 / probs.shape[1] if mean else 1.0  # the mean's division rides along in the update
    for name in emitted(plan):
        table = stats[stat(plan, name)]
        for heads in step.ranges:
            target, part = heads.cells(table), row[heads.first : heads.last, : heads.slots]
            shown = None if seen is None else seen[heads.first : heads.last, : heads.slots]
            if plan[Observation].decode == "replace":
                target.zero_()
            if name == "sum":
                target.add_(part, alpha=weight)
            elif name == "sumsq":
                target.addcmul_(part, part, value=weight * weight)
            elif name == "count":
                target.add_(1.0 if shown is None else shown)
            else:
                visible = heads.slots if shown is None else shown.sum(-1, keepdim=True).clamp(min=1)
                hit = part * weight >= EVEN / visible
                if name == "important":
                    target.add_(hit)
                elif isinstance(step.number, int):
                    target.masked_fill_(hit, step.number + 1)
                else:
                    number = step.number.flatten()[heads.first : heads.last, None]
                    target.copy_(torch.where(hit, number + 1.0, target))


def _with_padding(token: Token, state: State, call: Call, arrived: list[bool]) -> Tensor:
    """Some rows carry a pad token: one row at a time, pad rows only look."""
    outs = []
    for b, real in enumerate(arrived):
        row, own = row_of(state, b), call.of(b)
        if not real:
            outs.append(attend_only(token.q[b : b + 1], row, own))
            continue
        outs.append(decode_attend_reference(token.of(b), row, own))
        put_row(state, row, b)
    return torch.cat(outs)
