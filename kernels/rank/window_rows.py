"""window_rows: the rows of the observation window, for scorers that need more than sums over them. Pure torch."""

from __future__ import annotations

import torch
from kvpass.kernels.attention.masks import additive, at_positions, by_kv_head, visible
from kvpass.kernels.attention.memory import softmax_of
from kvpass.kernels.attention.observation import Observation
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
) -> Tensor:
    """Attention of the last `queries` valid queries of a call over all keys: a matrix of w x L per query head.

    Arguments as for prefill_attend; valid: bool [B, S], from there. Returns float32 [B, Hkv, G, w, L]: probabilities, 0
    where hidden; or, for a rule that reads `logits`, masked and scaled logits, -inf where hidden. A row whose sequence
    has fewer valid queries in the call is all hidden; such rows come first.
    """
    plan = Rule.parse(rule)
    index, there = _last_valid(valid, plan[Observation].queries)
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    queries = q.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    softmax = softmax_of("window_rows", queries, scale, sinks, softcap, memory_k, memory_v)
    rows = queries.float().unflatten(1, (heads, group))
    logits = softmax.capped((rows * softmax.factor) @ k.float().mT[:, :, None])
    where = torch.arange(k.shape[2], device=q.device)[None, None] if pos is None else pos
    seen = Shown(Sees.parse(sees), q.shape[2], position, tokens).at(where, index)
    shown = seen[:, :, None] & there[:, None, None, :, None]
    if mask is not None:
        here = _looked_up(mask, index, pos, heads, k.shape[2])
        shown = shown & visible(here)
        logits = logits if mask.dtype == torch.bool else logits + additive(here, torch.float32)
    logits = logits.masked_fill(~shown, -INF)
    if "logits" in plan[Scoring].reads:
        return logits
    flat = logits.permute(3, 0, 1, 2, 4)  # heads side by side, as the sinks are
    if softmax.beside is not None:
        turned = softmax.beside._replace(logit=softmax.beside.logit.permute(2, 0, 1))
        softmax = softmax._replace(beside=turned)
    return softmax.probabilities(flat).nan_to_num(0.0).permute(1, 2, 3, 0, 4).contiguous()


def _last_valid(valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
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
