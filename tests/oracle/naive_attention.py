"""The ops once more, as plain loops over rows in float64: an oracle that shares no code with the references."""

from __future__ import annotations

import torch
from kvpass.kernels.attention.observation import Observation
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.attention.visibility import Shown
from kvpass.kernels.budget import budget
from kvpass.kernels.rank.criterion import Ranking, Scope
from kvpass.kernels.rank.places import Protected
from kvpass.kernels.rank.ranking import reach_of, recent_of
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import FIRST, FREE, LIVE, SEEN
from kvpass.kernels.slots.statistics import Statistics, stat
from kvpass.kernels.testing import State
from torch import Tensor


def hidden(mask: Tensor) -> float:
    """An additive mask shows what is above this."""
    return max(torch.finfo(mask.dtype).min / 2, -1e8)


def capped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def softmax_row(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None, seen: Tensor, sink: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor]:
    """Probabilities float64 [L] of one query over keys [L, D], and which keys it sees."""
    logits = capped((k.double() @ q.double()) * scale, softcap)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        seen = seen & (mask > hidden(mask))
        logits = logits + mask.double()
    if not seen.any():
        return torch.zeros_like(logits), seen
    weights = logits.exp() * seen
    return weights / (weights.sum() + (0.0 if sink is None else sink.double().exp())), seen


def naive_seen(shown: Shown, b: int, i: int, position: int) -> bool:
    """Whether words and tokens show query i of row b the key at a position, -1 = none."""
    sees, p = shown.sees, shown.position + i
    if position < 0:
        return False
    if shown.tokens is not None and not bool(shown.tokens[min(b, len(shown.tokens) - 1), position]):
        return False
    if sees.causal and position > (i if sees.corner else p):
        return False
    if sees.window and not p - sees.window + 1 <= position:
        return False
    return not (sees.chunk and position // sees.chunk != p // sees.chunk)


def naive_prefill(
    q: Tensor, k: Tensor, v: Tensor, pos: Tensor | None, shown: Shown, softmax: Softmax, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """prefill_attend: (out, statistics, valid)."""
    batch, heads, queries, _ = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    group, start, mask = heads // kv_heads, shown.position, shown.mask
    out = torch.zeros(*q.shape[:3], v.shape[3])
    stats = torch.zeros(len(rule[Statistics].stats), batch, kv_heads, length, dtype=torch.float64)
    wide = None if mask is None else mask.expand(batch, heads, queries, -1)
    if wide is not None and wide.shape[3] == 1:
        wide = wide.expand(-1, -1, -1, start + length)
    valid = torch.ones(batch, queries, dtype=torch.bool)
    for b in range(batch):
        for j in range(queries):
            if shown.tokens is not None:
                valid[b, j] = shown.tokens[min(b, len(shown.tokens) - 1), start + j]
            if wide is not None:
                column = wide[b, :, :, start + j]
                valid[b, j] &= bool((column if column.dtype == torch.bool else column > hidden(wide)).any())
        observing = [j for j in range(queries) if valid[b, j]]
        if rule[Observation].queries >= 0:
            observing = observing[max(len(observing) - rule[Observation].queries, 0) :]
        for h in range(kv_heads):
            where = list(range(length)) if pos is None else pos[b, h].tolist()
            for i in range(queries):
                allowed = torch.tensor([naive_seen(shown, b, i, x) for x in where])
                rows, seen = [], []
                for head in range(h * group, h * group + group):
                    row = None if wide is None else wide[b, head, i][[max(x, 0) for x in where]]
                    sink = None if softmax.sinks is None else softmax.sinks[head]
                    p, s = softmax_row(q[b, head, i], k[b, h], softmax.scale, row, allowed, sink, softmax.softcap)
                    out[b, head, i] = (p @ v[b, h].double()).float()
                    rows.append(p)
                    seen.append(s)
                if i in observing:
                    a = torch.stack(rows).mean(0) if rule[Observation].group == "mean" else torch.stack(rows).amax(0)
                    values = {"sum": a, "sumsq": a * a, "count": torch.stack(seen).any(0).double()}
                    for n, name in enumerate(rule[Statistics].stats):
                        stats[n, b, h] += values[name]
    return out, stats.float(), valid


def naive_select(score: Tensor, live: Tensor, capacity: int) -> Tensor:
    """select_slots by sorting (score, index) pairs."""
    out = torch.full((*score.shape[:2], capacity), -1, dtype=torch.int32)
    for b in range(score.shape[0]):
        for h in range(score.shape[1]):
            values = score[b, h].tolist()
            best = sorted(range(len(values)), key=lambda i: (-values[i], i))[: int(live[b, h])]
            out[b, h, : len(best)] = torch.tensor(sorted(best), dtype=torch.int32)
    return out


def naive_decode(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    state: State,
    position: int,
    scale: float,
    rule: Rule,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """decode_attend without a mask; changes the state."""
    batch, heads, _, _ = q.shape
    kv_heads = k_new.shape[1]
    group = heads // kv_heads
    out = torch.zeros(batch, heads, 1, v_new.shape[3])
    for b in range(batch):
        for h in range(kv_heads):
            free, live = int(state.cursor[b, h, FREE]), int(state.cursor[b, h, LIVE])
            state.k[b, h, free], state.v[b, h, free] = k_new[b, h, 0], v_new[b, h, 0]
            state.pos[b, h, free] = position
            state.stats[:, b, h, free] = 0
            rows = []
            for g in range(group):
                keys, seen = state.k[b, h, : live + 1], torch.ones(live + 1, dtype=torch.bool)
                sink = None if sinks is None else sinks[h * group + g]
                p, _ = softmax_row(q[b, h * group + g, 0], keys, scale, None, seen, sink, softcap)
                out[b, h * group + g, 0] = (p @ state.v[b, h, : live + 1].double()).float()
                rows.append(p)
            a = torch.stack(rows).mean(0) if rule[Observation].group == "mean" else torch.stack(rows).amax(0)
            values = {"sum": a, "sumsq": a * a, "count": torch.ones_like(a)}
            for n, name in enumerate(rule[Statistics].stats):
                target = state.stats[n, b, h, : live + 1]
                if rule[Observation].decode == "add":
                    target += values[name].float()
                elif rule[Observation].decode == "replace":
                    target.copy_(values[name])
        for h in range(kv_heads):
            _settle(state, b, h, position, rule)
    return out


def _settle(state: State, b: int, h: int, position: int, rule: Rule) -> None:
    """Advance one head's cursor; over budget, free the slot with the lowest (score, age)."""
    cursor = state.cursor[b, h]
    used = int(cursor[LIVE]) + 1
    cursor[SEEN] += 1
    if cursor[FIRST] < 0:
        cursor[FIRST] = position
    n = budget(rule, int(cursor[SEEN]))
    if used <= n:
        cursor[LIVE], cursor[FREE] = used, used
        return
    pos = state.pos[b, h].tolist()
    first = int(cursor[FIRST])
    protected = {
        s for s in range(used) if pos[s] < first + rule[Protected].sinks or pos[s] > position - recent_of(rule, n)
    }
    open_slots = [s for s in range(used) if s not in protected]
    kept: set[int] = set()
    if rule[Scope].scope_num:
        spread = {s: _spread(state, b, h, s, rule) for s in open_slots}
        order = sorted(open_slots, key=lambda s: (-spread[s], pos[s]))
        kept = set(order[: max((reach_of(rule, n) or 0) - len(protected), 0)])
    score = {s: _score(state, b, h, s, rule) if s not in kept else 3.0e38 for s in open_slots}
    victim = min(open_slots, key=lambda s: (score[s], -pos[s]))
    state.pos[b, h, victim] = -1
    cursor[FREE] = victim


def _spread(state: State, b: int, h: int, s: int, rule: Rule) -> float:
    total, square, count = (state.stats[stat(rule, n), b, h, s] for n in ("sum", "sumsq", "count"))
    count = count.clamp(min=1)
    return float((square / count - (total / count) * (total / count)).clamp(min=0).sqrt())


def _score(state: State, b: int, h: int, s: int, rule: Rule) -> float:
    if rule[Ranking].score == "position":
        return float(state.pos[b, h, s])
    heads = range(state.pos.shape[1]) if rule[Ranking].heads == "all" else [h]
    scores = []
    for i in heads:
        total = state.stats[stat(rule, "sum"), b, i, s]
        mean = rule[Ranking].score == "mean"
        scores.append(float(total / state.stats[stat(rule, "count"), b, i, s].clamp(min=1) if mean else total))
    return sum(scores) / len(scores)
