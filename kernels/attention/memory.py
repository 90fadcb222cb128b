"""Memory keys and values: learned ones in front of a cache, which every query sees and nothing evicts.

For one query they are as good as a single key: its logit is the log-sum-exp of theirs, its value what attention over
them alone gives. So they take no slots, and the kernels meet them as they meet learned sinks, but for the value.
"""

from __future__ import annotations

import torch
from kvpass.kernels.attention.softmax import Beside, Softmax, check_softmax
from torch import Tensor

BLIND = 1e30
"""A log-sum-exp from which on a row has seen no key of the cache (`observe.NEVER`, and infinity in Triton)."""


def softmax_of(
    op: str, q: Tensor, scale: float, sinks: Tensor | None, softcap: float, keys: Tensor | None, values: Tensor | None
) -> Softmax:
    """How an op makes probabilities for queries [B, Hq, S, D], with the memory [1 or B, Hm, M, D] that it is given.
    Hm: the KV heads, or all query heads.

    Raises ValueError for sinks, a softcap or a memory that do not fit.
    """
    check_softmax(op, q.shape[1], sinks, softcap)
    softmax = Softmax(scale, sinks, softcap)
    if keys is None and values is None:
        return softmax
    if keys is None or values is None or keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"{op}: memory must have as many values as keys")
    if keys.shape[0] not in (1, q.shape[0]) or q.shape[1] % keys.shape[1] or keys.shape[3] != q.shape[3]:
        raise ValueError(f"{op}: memory keys {list(keys.shape)} do not fit q {list(q.shape)}")
    return Softmax(scale, None, softcap, _beside(q, keys, values, softmax))


def _beside(q: Tensor, keys: Tensor, values: Tensor, softmax: Softmax) -> Beside:
    """All memory keys as one key per query, with the sinks' share taken off its value. Nothing is written in place."""
    (batch, heads, count, dim), shared = q.shape, keys.shape[1]
    rows = (q.float() * softmax.factor).reshape(batch, shared, -1, dim)  # the heads of a group below each other
    logits = rows @ keys.float().transpose(-1, -2)
    if softmax.softcap:
        logits = torch.tanh(logits) * softmax.softcap
    logits = logits.reshape(batch, heads, count, -1)
    top = logits.amax(-1, keepdim=True)
    sink = None if softmax.sinks is None else softmax.sinks.float().reshape(1, -1, 1, 1)
    top = top if sink is None else torch.maximum(top, sink)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    total = total if sink is None else total + torch.exp(sink - top)
    shares = (weights / total).reshape(batch, shared, -1, weights.shape[-1])
    value = (shares @ values.float()).reshape(batch, heads, count, -1)
    return Beside((top + torch.log(total)).squeeze(-1), value)


def joined(out: Tensor, lse: Tensor, beside: Beside) -> tuple[Tensor, Tensor]:
    """Attention over the keys of a call, [b, Hq, rows, Dv] with its log-sum-exp [b, Hq, rows], and what is beside them.
    Rows that see no key get what is beside alone, and keep their log-sum-exp.
    """
    blind = lse >= BLIND
    share = torch.sigmoid(beside.logit - lse).masked_fill(blind, 1.0)[..., None]
    both = torch.where(blind[..., None], 0.0, out * (1.0 - share)) + beside.value * share
    return both.to(out.dtype), torch.where(blind, lse, torch.logaddexp(lse, beside.logit))
