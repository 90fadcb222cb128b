"""Reference of decode_attend in torch: the meaning, and the CPU path.

Called once per layer and token, so it counts torch calls: what the cursor says is read once into Python numbers, bool
masks that hide no live slot are dropped, and rare cases (ties, padding, hidden slots) take longer roads.
"""

from __future__ import annotations

import torch
from kvpass.kernels.attention.masks import additive, at_positions, by_kv_head, check_shown, shows_padding, visible
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.decode_attend.look import look
from kvpass.kernels.decode_attend.step import Step, read_step
from kvpass.kernels.decode_attend.victim import settle, used_positions
from kvpass.kernels.rule import FIRST, SEEN, Rule
from kvpass.kernels.slots.ragged import put_row, row_of
from torch import Tensor

INF = float("inf")


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
    arrive: Tensor | None = None,
) -> Tensor:
    """See `kvpass.kernels.decode_attend.decode_attend`."""
    plan, softmax = Rule.parse(rule).of_steps, Softmax(scale, sinks, softcap)
    cells = cursor.view(-1, plan.columns).tolist()
    if mask is None and any(c[SEEN] < position for c in cells[:: k.shape[1]]):
        raise shows_padding()
    if mask is not None and _hides_nothing(mask, cells, position):
        mask = None
    if mask is not None:
        check_shown(mask, cursor[:, 0, SEEN], position)
        arrived = _arrived(mask, position, len(q))
        if not all(arrived):
            state = [k, v, pos, stats, cursor]
            return _with_padding(q, k_new, v_new, mask, state, position, softmax, rule, (latent, arrive), arrived)
    step = read_step(cells, cursor, position, k.shape[2], plan)
    _append(step.rows, k_new, v_new, k, v)
    _arrive(pos, stats, step, arrive)
    used = None if mask is None else used_positions(pos, cursor, step, plan)
    probs, seen = _probabilities(q, k, mask, used, step, softmax)
    if plan.emitted and plan.decode != "none":
        _observe(stats, probs, seen, step, plan)
    values = k[..., :latent] if latent else v
    out = _mix(probs, values, step).to(q.dtype).view(*q.shape[:3], values.shape[3])
    settle(pos, stats, cursor, step, plan)
    return out


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


def _append(rows: Tensor, k_new: Tensor, v_new: Tensor, k: Tensor, v: Tensor) -> None:
    """Write the token's key and value. State tensors are contiguous, so a slot is one row of a matrix."""
    k.view(-1, k.shape[3]).index_copy_(0, rows, k_new.reshape(-1, k.shape[3]))
    if v.shape[3]:
        v.view(-1, v.shape[3]).index_copy_(0, rows, v_new.reshape(-1, v.shape[3]))


def _arrive(pos: Tensor, stats: Tensor, step: Step, arrive: Tensor | None) -> None:
    """Write the token's position, and statistics to start with."""
    pos.view(-1).index_fill_(0, step.rows, step.position)
    if stats.shape[0]:
        flat = stats.view(stats.shape[0], -1)
        if arrive is None:
            flat.index_fill_(1, step.rows, 0.0)
        else:
            flat.index_copy_(1, step.rows, arrive.reshape(stats.shape[0], -1))


def _probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, pos: Tensor | None, step: Step, softmax: Softmax
) -> tuple[Tensor, Tensor | None]:
    """float32 [B*Hkv, G, n], 0 on empty slots; and if masked bool [B*Hkv, n], what some query of the group sees. pos:
    int32 [B, Hkv, n], if masked.
    """
    queries = q.reshape(k.shape[0] * k.shape[1], -1, q.shape[3])
    if len(step.runs) == 1:
        unused = queries.new_empty(1, dtype=torch.float32)
        keys = step.runs[0].rows(k).float().mT
        logits = softmax.capped(torch.baddbmm(unused, queries.float(), keys, beta=0, alpha=softmax.factor))
    else:  # a run of heads at a time: undefined keys of empty slots are not read
        logits = torch.full((*queries.shape[:2], step.slots), -INF, device=q.device)
        scaled = queries.float() * softmax.factor
        for run in step.runs:
            part = torch.bmm(scaled[run.first : run.last], run.rows(k).float().mT)
            logits[run.first : run.last, :, : run.slots] = softmax.capped(part)
    if mask is None or pos is None:
        return softmax.probabilities(logits), None
    return _masked_softmax(logits, mask, pos, softmax)


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


def _mix(probs: Tensor, v: Tensor, step: Step) -> Tensor:
    """probs [B*Hkv, G, n] @ v in float32. Undefined values of empty slots never enter a product."""
    parts = [torch.bmm(probs[r.first : r.last, :, : r.slots], r.rows(v).float()) for r in step.runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _observe(stats: Tensor, probs: Tensor, seen: Tensor | None, step: Step, plan: Rule) -> None:
    """Update the statistics of the used slots in place with this query's row, reduced over the group."""
    mean = plan.group == "mean"
    row = probs.sum(1) if mean else probs.amax(1)
    weight = 1.0 / probs.shape[1] if mean else 1.0  # the mean's division rides along in the update
    for name in plan.emitted:
        table = stats[plan.stat(name)]
        for run in step.runs:
            target, part = run.cells(table), row[run.first : run.last, : run.slots]
            shown = None if seen is None else seen[run.first : run.last, : run.slots]
            if plan.decode == "replace":
                target.zero_()
            if name == "sum":
                target.add_(part, alpha=weight)
            elif name == "sumsq":
                target.addcmul_(part, part, value=weight * weight)
            elif name == "count":
                target.add_(1.0 if shown is None else shown)
            else:
                visible = run.slots if shown is None else shown.sum(-1, keepdim=True).clamp(min=1)
                hit = part * weight >= 1.0 / visible
                if name == "important":
                    target.add_(hit)
                elif isinstance(step.number, int):
                    target.masked_fill_(hit, step.number + 1)
                else:
                    number = step.number.flatten()[run.first : run.last, None]
                    target.copy_(torch.where(hit, number + 1.0, target))


def _with_padding(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    mask: Tensor,
    state: list[Tensor],
    position: int,
    softmax: Softmax,
    rule: str,
    extras: tuple[int, Tensor | None],
    arrived: list[bool],
) -> Tensor:
    """Some rows carry a pad token: one row at a time, pad rows only look."""
    latent, arrive = extras
    outs = []
    for b, real in enumerate(arrived):
        one, seen = slice(b, b + 1), mask if mask.shape[0] == 1 else mask[b : b + 1]
        k, v, pos, stats, cursor = row = row_of(state, b)
        if not real:
            outs.append(look(q[one], seen, k, k[..., :latent] if latent else v, pos, cursor, softmax))
            continue
        new, told = (q[one], k_new[one], v_new[one]), None if arrive is None else arrive[:, one]
        five, (scale, sinks, softcap) = (k, v, pos, stats, cursor), softmax
        outs.append(decode_attend_reference(*new, seen, *five, position, scale, rule, sinks, softcap, latent, told))
        put_row(state, row, b)
    return torch.cat(outs)
