"""window_rows: the rows of the observation window, for scorers that need more than sums over them. Pure torch."""

from __future__ import annotations

import torch
from kvpass.kernels.attention.masks import additive, at_positions, by_kv_head, visible
from kvpass.kernels.attention.memory import softmax_of
from kvpass.kernels.attention.observation import Observation
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.attention.visibility import Sees, Shown
from kvpass.kernels.rank.scored import Scoring
from kvpass.kernels.rule import Rule
from torch import Tensor

INF = float("inf")


def window_rows(
    q: Tensor,
    k: Tensor,
    pos: Tensor | None,
    mask: Tensor | None,
    valid: Tensor,
    scale: float,
    sees: str,
    rule: str,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    tokens: Tensor | None = None,
    position: int = 0,
    memory_k: Tensor | None = None,
    memory_v: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of the last `queries` valid queries of a call over all keys: a matrix of w x L per query head.

    Arguments as for prefill_attend, bias too; valid: bool [B, S], from there. Returns float32 [B, Hkv, G, w, L]:
    probabilities, 0 where hidden; or, for a rule that reads `logits`, masked and scaled logits, -inf where hidden. A
    row whose sequence has fewer valid queries in the call is all hidden; such rows come first.
    """
    plan = Rule.parse(rule)
    index, there = last_valid(valid, plan[Observation].queries)
    queries = picked(q, index)
    softmax = softmax_of("window_rows", queries, scale, sinks, softcap, memory_k, memory_v)
    shown = Shown(Sees.parse(sees), q.shape[2], position, tokens, None, mask, bias)
    logits = logits_of(queries, index, k, pos, shown, softmax).masked_fill(~there[:, None, None, :, None], -INF)
    if "logits" in plan[Scoring].reads:
        return logits
    return probabilities_of(logits, softmax)


def probabilities_of(logits: Tensor, softmax: Softmax) -> Tensor:
    """Softmax of logits [B, Hkv, G, w, L], of queries that `softmax` was made for; 0 where a query sees nothing."""
    flat = logits.permute(3, 0, 1, 2, 4)  # heads side by side, as the sinks are
    if softmax.beside is not None:
        turned = softmax.beside._replace(logit=softmax.beside.logit.permute(2, 0, 1))
        softmax = softmax._replace(beside=turned)
    return softmax.probabilities(flat).nan_to_num(0.0).permute(1, 2, 3, 0, 4).contiguous()


def picked(q: Tensor, index: Tensor) -> Tensor:
    """Queries `index`, int64 [B, w], of q [B, Hq, S, D]: [B, Hq, w, D]."""
    return q.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))


def logits_of(queries: Tensor, index: Tensor, k: Tensor, pos: Tensor | None, shown: Shown, softmax: Softmax) -> Tensor:
    """Masked and scaled logits of some queries of a call, -inf where hidden: float32 [B, Hkv, G, w, L].

    queries [B, Hq, w, D], of places `index`, int64 [B, w], in the call; k, pos: as of `window_rows`.
    """
    heads, group = k.shape[1], queries.shape[1] // k.shape[1]
    rows = queries.float().unflatten(1, (heads, group))
    logits = softmax.capped((rows * softmax.factor) @ k.float().mT[:, :, None])
    where = torch.arange(k.shape[2], device=k.device)[None, None] if pos is None else pos
    seen, mask = shown.at(where, index)[:, :, None], shown.mask
    if mask is not None:
        here = _looked_up(mask, index, pos, heads, k.shape[2])
        seen = seen & visible(here)
        logits = logits if mask.dtype == torch.bool else logits + additive(here, torch.float32)
    if shown.bias is not None:
        logits = logits + shown.bias[:, :, None, None]
    return logits.masked_fill(~seen, -INF)


def last_valid(valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices of the last `count` valid queries, int64 [B, w], ascending, and which of them exist, bool [B, w]."""
    count = min(count, valid.shape[1])
    order = valid.int().sort(dim=-1, stable=True).indices[:, valid.shape[1] - count :]
    return order, valid.gather(1, order)


def _looked_up(mask: Tensor, index: Tensor, pos: Tensor | None, heads: int, keys: int) -> Tensor:
    """The mask for the window's queries and the keys: broadcastable to [B, Hkv, G, w, L]."""
    if mask.shape[2] > 1:
        wide = mask.expand(len(index), -1, -1, -1)
        at = index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        mask = wide.gather(2, at)
    rows = by_kv_head(mask, heads)
    return rows[..., :keys] if pos is None else at_positions(rows, pos)
