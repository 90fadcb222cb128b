"""How many slots each head gets when the heads of a layer share a budget. Pure torch."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote

import torch
from kvpass.kernels.budget import part
from kvpass.kernels.errors import TableError
from kvpass.kernels.rank.criterion import UNTOUCHABLE
from kvpass.kernels.rank.layer import Layer
from kvpass.kernels.rank.tables import layer_of
from kvpass.kernels.rule import Record, Rule
from kvpass.kernels.slots.cursor import EXTRA
from torch import Tensor


@dataclass(frozen=True)
class Heads(Record):
    """How heads with budgets of their own share a layer's slots.

    Attributes:
        table: a file of shares, quoted; empty: by what their keys score.
        safe_num, safe_den: the share of the even budget that each head keeps in any case (kvpress' safeguard).
    """

    table: str = ""
    safe_num: int = 0
    safe_den: int = 1


def ranks(score: Tensor) -> Tensor:
    """Rank of each entry along the last dim, int64, 0 for the largest; of equal ones the first comes first."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def head_counts(score: Tensor, candidate: Tensor, size: Tensor, rule: Rule) -> Tensor:
    """Ada-KV (arXiv 2407.11550): the best `Hkv * size` keys of a layer stay, whatever head they belong to.

    score float32 [B, Hkv, L], +inf protected; candidate bool, the same; size int64 [B, Hkv, 1], equal over heads. The
    best floor(size * safe_num / safe_den) keys of each head, at least one, are safe (kvpress' safeguard). Equal scores:
    the older key, then the lower head.

    Returns int64 [B, Hkv]: counts, which sum to Hkv * size, or to all candidates while there are fewer.
    """
    batch, heads, length = score.shape
    safe = part(size, rule[Heads].safe_num, rule[Heads].safe_den).clamp(min=1)
    raised = torch.where((ranks(score) < safe) & (score < UNTOUCHABLE) & candidate, UNTOUCHABLE, score)
    flat = raised.transpose(1, 2).reshape(batch, length * heads)
    kept = ranks(flat) < heads * size[:, 0]
    return (kept.view(batch, length, heads) & candidate.transpose(1, 2)).sum(1)


def table_counts(candidate: Tensor, size: Tensor, protected: Tensor, rule: Rule) -> Tensor:
    """Budgets by a table, `heads` [layers, Hkv] of the rule's file (DuoAttention, arXiv 2410.10819; RazorAttention,
    arXiv 2407.15891): each head gets its protected slots and one more, and its share of what is left of `Hkv * size`.

    candidate bool [B, Hkv, L]; size, protected int64 [B, Hkv, 1]. Returns int64 [B, Hkv]: counts, at most the
    candidates. Raises TableError if the table is not for so many heads, or holds no positive share.
    """
    heads = candidate.shape[1]
    share = layer_of(unquote(rule[Heads].table), "heads", rule[Layer].layer, candidate.device).double()
    if share.shape != (heads,) or not bool((share >= 0).all()) or not bool(share.sum() > 0):
        what = f"{unquote(rule[Heads].table)}: 'heads' of layer {rule[Layer].layer} is {share.tolist()}"
        raise TableError(what, f"give {heads} shares >= 0 for each layer, one of them above 0")
    least = torch.minimum(protected + 1, size)[..., 0]
    rest = (heads * size[..., 0] - least.sum(-1, keepdim=True)).double() * (share / share.sum())
    left = (rest.sum(-1, keepdim=True) + 0.5).long() - rest.long().sum(-1, keepdim=True)
    counts = least + rest.long() + (ranks(rest - rest.long()) < left)
    return torch.minimum(counts, candidate.sum(-1))


def ragged_columns(counts: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """(EXTRA, SHIFT) of the cursor, int64 [B, Hkv]: what a head holds above the even budget, and the sum of that over
    the heads before it. Zero while no head is above.
    """
    even = size[..., 0]
    extra = torch.where((counts > even).any(-1, keepdim=True), counts - even, 0)
    return extra, extra.cumsum(-1) - extra


def with_preference(cursor: Tensor, preference: Tensor) -> Tensor:
    """The cursor of a layer that keeps all candidates, with its preference [B] as the bits of EXTRA, where
    `kvpass.kernels.after_call.layers.shared_out` reads it.
    """
    cursor = cursor.clone()
    cursor[..., EXTRA] = preference.float().view(torch.int32)[:, None]
    return cursor


def preference_of(cursor: Tensor) -> Tensor:
    """float32 [B]"""
    return cursor[:, 0, EXTRA].contiguous().view(torch.float32)
