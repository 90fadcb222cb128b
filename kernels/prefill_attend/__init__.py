"""prefill_attend: attention of many queries, and what each key got of it.

The reference is the meaning. On CPUs C++ of our own runs what it knows (`native`); triton runs on CUDA and ROCm.
"""

from __future__ import annotations

import torch
from kvpass.kernels.attention.masks import visible
from kvpass.kernels.attention.memory import softmax_of
from kvpass.kernels.attention.visibility import Sees, Shown, said_in_words, token_bounds
from kvpass.kernels.choose import implementation, kernel
from kvpass.kernels.prefill_attend.native import prefill_attend_native
from kvpass.kernels.prefill_attend.reference import prefill_attend_reference
from kvpass.kernels.rule import Rule
from torch import Tensor


def prefill_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    mask: Tensor | None,
    scale: float,
    sees: str,
    rule: str,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    tokens: Tensor | None = None,
    bounds: Tensor | None = None,
    position: int = 0,
    memory_k: Tensor | None = None,
    memory_v: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend, and observe the rows of probabilities that the rule asks for.

    q [B, Hq, S, D], k [B, Hkv, L, D], v [B, Hkv, L, Dv], one float dtype, Hq a multiple of Hkv. pos None: L == S and
    key l has position l; else int32 [B, Hkv, L], -1 = empty (finite k and v), the last S keys are the call's own. mask:
    bool (True = attend) or additive float, broadcastable to [B, Hq, S, T], looked up at the keys' positions. sees: the
    words of `Sees`, what queries see besides, at positions `position` + i; tokens: bool [1 or B, T], hides columns that
    hold no token; bounds: of `token_bounds`, or of `mask_spans` for a prompt with a mask and no tokens,
    once for all layers (None: found here). softcap: above 0, logits become
    softcap * tanh(logit / softcap) before the mask is added. sinks: any float dtype [Hq], one more logit per query head
    in the softmax's denominator, neither capped nor masked. memory_k, memory_v [1 or B, Hm, M, ..], Hm = Hkv or Hq:
    keys and values of no token that all queries see, whatever the mask. bias: float32 [B, Hkv, L], added to the logits
    of each key (`kvpass.kernels.slots.bias`), with pos; on CUDA such a call is the reference's. A query that sees no
    key gets the mean of v, as softmax gives it, if that is a float mask's doing, or the words say so; else zeros. With
    a memory it gets that.

    Returns (out [B, Hq, S, Dv] = softmax(q k^T scale + mask) v, in memory [B, S, Hq, Dv]: models transpose and view
    it so; statistics of this call (`emitted(rule)`), float32 [M, B, Hkv, L]; valid bool [B, S]). Raises ValueError on
    shapes or dtypes that do not fit.
    """
    _check(q, k, v, pos, mask)
    if bias is not None and (pos is None or bias.shape != pos.shape or bias.dtype != torch.float32):
        raise ValueError(f"prefill_attend: bias must be float32 {list(k.shape[:3])} beside pos, got {list(bias.shape)}")
    softmax = softmax_of("prefill_attend", q, scale, sinks, softcap, memory_k, memory_v)
    shown = Shown(Sees.parse(sees).within(q.shape[2], position), q.shape[2], position, tokens, bounds, mask, bias)
    if mask is not None and mask.device.type == "cpu":
        shown = said_in_words(shown, pos is None)
    elif tokens is not None and bounds is None:
        shown = shown._replace(bounds=token_bounds(tokens, position, q.shape[2]))
    run, said = kernel("prefill_attend", q.device, q, rule, bias), Rule.parse(rule)
    native = implementation("prefill_attend", q.device) == "native"
    done = prefill_attend_native(q, k, v, pos, shown, softmax, said) if native else None
    out, stats, valid = done or run(q, k, v, pos, shown, softmax, said)
    alone = sinks is None and softmax.beside is None
    if pos is None and alone and (shown.mask is not None or run is prefill_attend_reference):
        out = _blind_rows_averaged(out, v, shown)
    return out.transpose(1, 2).contiguous().transpose(1, 2), stats, valid


def _blind_rows_averaged(out: Tensor, v: Tensor, shown: Shown) -> Tensor:
    """Queries to which numbers, not truths, show no key: all their logits are the smallest number, so softmax weighs
    all keys alike. They are padding, but some models read the output of padding. Triton's kernel does it itself where
    no mask is left.
    """
    mask, blind = shown.mask, None
    if mask is not None and mask.dtype != torch.bool:
        blind = ~visible(mask[..., : v.shape[2]]).any(-1, keepdim=True)
    hidden = shown.blind() if shown.sees.mean else None
    if hidden is not None:
        hidden = hidden[:, None, :, None]
        blind = hidden if blind is None else blind | hidden
    if blind is None or (blind.device.type == "cpu" and not bool(blind.any())):
        return out
    mean = v.float().mean(2, keepdim=True).to(out.dtype).repeat_interleave(out.shape[1] // v.shape[1], 1)
    return torch.where(blind, mean, out)


def _check(q: Tensor, k: Tensor, v: Tensor, pos: Tensor | None, mask: Tensor | None) -> None:
    batch, heads, queries, dim = q.shape
    if k.dim() != 4 or k.shape[0] != batch or k.shape[3] != dim or heads % k.shape[1]:
        raise ValueError(f"prefill_attend: q {list(q.shape)} does not fit k {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"prefill_attend: v {list(v.shape)} does not fit k {list(k.shape)}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"prefill_attend: q, k, v must share a float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if k.shape[2] < queries or (pos is None and k.shape[2] != queries):
        raise ValueError(f"prefill_attend: {queries} queries do not fit {k.shape[2]} keys (pos: {pos is not None})")
    if pos is not None and (pos.shape != k.shape[:3] or pos.dtype != torch.int32):
        raise ValueError(f"prefill_attend: pos must be int32 {list(k.shape[:3])}, got {pos.dtype} {list(pos.shape)}")
    if mask is None:
        return
    allowed = ((1, batch), (1, heads), (1, queries))
    if mask.dim() != 4 or any(n not in sizes for n, sizes in zip(mask.shape, allowed, strict=False)):
        raise ValueError(f"prefill_attend: mask {list(mask.shape)} must broadcast to {[batch, heads, queries, 'T']}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"prefill_attend: mask must be bool or float, got {mask.dtype}")
