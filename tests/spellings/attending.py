"""The attention: q [B, S, H, D]; k, v [B, H, T, D], [B, T, H, D] (`tokens_first`) or [B, T, D] (one head for all)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from spellings.masking import as_float, masked
from torch import Tensor

CAP = 4.0
SINGLE = "mqa"


def shared(heads: str, x: Tensor, group: int, axis: int) -> Tensor:
    """A KV head for each query head."""
    if heads == "repeat":
        return x.repeat_interleave(group, dim=axis)
    if heads == "expand":
        sizes = list(x.shape)
        x = x.unsqueeze(axis + 1).expand(*sizes[: axis + 1], group, *sizes[axis + 1 :])
        return x.reshape(*sizes[:axis], sizes[axis] * group, *sizes[axis + 1 :])
    return x


def heads_first(x: Tensor, tokens_first: bool) -> Tensor:
    """[B, H, T, D]; [B, 1, T, D] of one head for all."""
    if x.dim() == 3:
        return x.unsqueeze(1)
    return x.transpose(1, 2) if tokens_first else x


def sdpa(s: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool) -> Tensor:
    tokens_first = s.layout != "bhtd"
    k, v = heads_first(k, tokens_first), heads_first(v, tokens_first)
    q = q.transpose(1, 2)
    if s.heads == SINGLE:
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    group = q.shape[1] // k.shape[1]
    k, v = shared(s.heads, k, group, 1), shared(s.heads, v, group, 1)
    if mask is not None and s.applied != "bool":
        mask = as_float(mask, bias, s.applied, q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=s.heads == "gqa")
    return y.transpose(1, 2)


def matmul(s: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool) -> Tensor:
    tokens_first = s.layout != "bhtd"
    k, v = heads_first(k, tokens_first), heads_first(v, tokens_first)
    q = q.transpose(1, 2)
    group = q.shape[1] // k.shape[1]
    if s.heads == "five":
        q = q.unflatten(1, (-1, group))
        k, v = k.unsqueeze(2), v.unsqueeze(2)
        bias = None if bias is None else bias.unflatten(0, (-1, group))
    else:
        k, v = shared(s.heads, k, group, 1), shared(s.heads, v, group, 1)
    scores = capped(s, q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5)
    y = masked(scores, mask, bias, s.applied).softmax(-1) @ v
    return (y.flatten(1, 2) if s.heads == "five" else y).transpose(1, 2)


def einsum(s: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool) -> Tensor:
    """In the cache's own axes."""
    axis = 1 if s.layout == "bhtd" else 2
    heads = 1 if s.heads == SINGLE else k.shape[axis]
    group = q.shape[2] // heads
    keys = {"bhtd": "bhkd", "btd": "bkd"}.get(s.layout, "bkhd")
    queries, scores = "bqhd", "bhqk"
    if s.heads == "five":
        q, queries, scores = q.unflatten(2, (-1, group)), "bqhgd", "bhgqk"
        bias = None if bias is None else bias.unflatten(0, (-1, group))
    elif s.heads != SINGLE:
        k, v = shared(s.heads, k, group, axis), shared(s.heads, v, group, axis)
    logits = capped(s, torch.einsum(f"{queries},{keys}->{scores}", q, k) * q.shape[-1] ** -0.5)
    weights = masked(logits, mask, bias, s.applied).softmax(-1)
    y = torch.einsum(f"{scores},{keys}->{queries}", weights, v)
    return y.flatten(2, 3) if s.heads == "five" else y


def capped(s: Any, scores: Tensor) -> Tensor:
    return CAP * torch.tanh(scores / CAP) if s.beside == "softcap" else scores


ATTENTIONS = {"sdpa": sdpa, "matmul": matmul, "einsum": einsum}
