"""decode_attend: one token through attention and cache in one op.

The reference is the meaning; triton runs on CUDA and ROCm.
"""

from __future__ import annotations

import torch
from kvpass.kernels.attention.softmax import check_softmax
from kvpass.kernels.choose import WIDEST, kernel
from kvpass.kernels.rule import Rule
from torch import Tensor


def decode_attend(
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
    """Append one token, attend over the slots in use, update statistics, evict one slot if over budget.

    q [B, Hq, 1, D], k_new [B, Hkv, 1, D], v_new [B, Hkv, 1, Dv], one float dtype; mask None, bool or additive float,
    broadcastable to [B, Hq, 1, T], looked up at the slots' positions. The state, changed in place: k [B, Hkv, C, D],
    v [B, Hkv, C, Dv], pos int32 [B, Hkv, C], stats float32 [N, B, Hkv, C], cursor int32 [B, Hkv, 4]; contiguous,
    C > LIVE. A row whose mask hides `position` from its own query in every head (padding) changes nothing. softcap:
    above 0, logits become softcap * tanh(logit / softcap) before the mask is added. sinks: any float dtype [Hq], one
    more logit per query head in the softmax's denominator, neither capped nor masked. latent: above 0, the values are
    the first `latent` entries of the keys (multi-head latent attention), v_new and v have no entries. arrive:
    float32 [N, B, Hkv], the statistics of the token's slot before this query adds to them (`arrivals`), zeros without.
    Latents and rules that are not `Rule.plain` run the reference on every device.

    Returns out [B, Hq, 1, Dv] = softmax(q k^T scale + mask) v. Raises ValueError on shapes or dtypes that do not fit.
    """
    batch, heads, slots, dim = k.shape
    if q.shape[0] != batch or q.shape[3] != dim or q.shape[1] % heads or q.shape[2] != 1 or k_new.shape[2] != 1:
        raise ValueError(f"decode_attend: q {list(q.shape)}, k_new {list(k_new.shape)} do not fit k {list(k.shape)}")
    if v.shape[2] != slots or pos.shape[2] != slots or stats.shape[-1] != slots:
        raise ValueError(f"decode_attend: v, pos and stats must have the {slots} slots of k")
    if q.dtype != k.dtype or pos.dtype != torch.int32 or cursor.dtype != torch.int32:
        raise ValueError(
            f"decode_attend: q {q.dtype} and k {k.dtype} must agree, pos {pos.dtype} and cursor {cursor.dtype} be int32"
        )
    if sinks is not None or softcap:
        check_softmax("decode_attend", q.shape[1], sinks, softcap)
    wide = latent > 0 or dim > WIDEST or not Rule.parse(rule).plain
    run = kernel("decode_attend", q.device, wide)
    extras = (sinks, softcap, latent, arrive) if wide else (sinks, softcap)
    out: Tensor = run(q, k_new, v_new, mask, k, v, pos, stats, cursor, position, scale, rule, *extras)
    return out
