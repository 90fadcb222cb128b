"""decode_attend: one token through attention and cache in one op.

The reference is the meaning. On CPUs C++ of our own runs what it knows (`native`), on CUDA and ROCm triton where it
`supports` the rule, and `device` elsewhere: neither reads anything back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvpass.kernels.attention.memory import softmax_of
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.choose import implementation, kernel
from kvpass.kernels.decode_attend.call import Call, Token
from kvpass.kernels.decode_attend.native import decode_attend_native
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.state import State
from torch import Tensor


def decode_attend(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    mask: Tensor | None,
    state: Sequence[Tensor],
    position: int,
    scale: float,
    rule: str,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    latent: int = 0,
    arrive: Tensor | None = None,
    sees: str = "",
    tokens: Tensor | None = None,
    bounds: Tensor | None = None,
    at: Tensor | None = None,
    memory_k: Tensor | None = None,
    memory_v: Tensor | None = None,
) -> Tensor:
    """Append one token, attend over the slots in use, update statistics, evict one slot if over budget.

    q [B, Hq, 1, D], k_new [B, Hkv, 1, D], v_new [B, Hkv, 1, Dv], one float dtype; mask None, bool or additive float,
    broadcastable to [B, Hq, 1, T], looked up at the slots' positions. state: the tensors of `State` under the rule,
    changed in place; contiguous, C > LIVE. sees: the words of `Sees`, what the query sees besides; tokens: bool
    [1 or B, T], hides columns that hold no token; bounds: of `token_bounds`, once for all layers (None: found here). A
    row in which `position` is hidden from its own query in every head (padding) changes nothing. at: int [1], the
    position on the device, where it changes from step to step and the host must not know it; `position` means nothing
    then. softcap: above 0, logits become softcap * tanh(logit / softcap) before the mask is added. sinks: any float
    dtype [Hq], one more logit per query head in the softmax's denominator, neither capped nor masked. latent: above 0,
    the values are the first `latent` entries of the keys (multi-head latent attention), v_new and v have no entries.
    arrive: float32 [N, B, Hkv], the statistics of the token's slot before this query adds to them (`arrivals`), zeros
    without. memory_k, memory_v [1 or B, Hm, M, ..], Hm = Hkv or Hq: keys and values of no token, in no slot, that the
    query sees whatever the mask; on CUDA such a step is `device`'s.

    Returns out [B, Hq, 1, Dv] = softmax(q k^T scale + mask) v. Raises ValueError on shapes or dtypes that do not fit.
    """
    native = implementation("decode_attend", q.device) == "native" and at is None and memory_k is None and not latent
    if native and mask is None and (tokens is None or bounds is not None):
        softmax, native = Softmax(scale, sinks, softcap), False
        done = decode_attend_native(q, k_new, v_new, state, position, rule, softmax, arrive, sees, tokens, bounds)
        if done is not None:
            return done
    plan = Rule.parse(rule)
    held = State.of(state, plan)
    batch, heads, _, dim = held.k.shape
    if q.shape[0] != batch or q.shape[3] != dim or q.shape[1] % heads or q.shape[2] != 1 or k_new.shape[2] != 1:
        shape = list(held.k.shape)
        raise ValueError(f"decode_attend: q {list(q.shape)}, k_new {list(k_new.shape)} do not fit k {shape}")
    for field, tensor in held.per_slot():
        if tensor.shape[field.rows + 2] != held.slots:
            raise ValueError(
                f"decode_attend: {field.name} {list(tensor.shape)} must have the {held.slots} slots of pos"
            )
    _check_dtypes(q, held)
    softmax = softmax_of("decode_attend", q, scale, sinks, softcap, memory_k, memory_v)
    if at is not None and implementation("decode_attend", q.device) != "triton":
        position, at = int(at), None
    token = Token(q, k_new, v_new, arrive)
    call = Call.of_step(mask, position, softmax, plan, latent, sees, tokens, bounds, at)
    shown = call.columns() if native else None
    if shown is not None:
        done = decode_attend_native(q, k_new, v_new, state, position, rule, softmax, arrive, *shown)
        if done is not None:
            return done
    out: Tensor = kernel("decode_attend", q.device, token, held, call)(token, held, call)
    return out


def _check_dtypes(q: Tensor, state: State) -> None:
    k, pos, cursor = state.k.dtype, state.pos.dtype, state.cursor.dtype
    if q.dtype != k or pos != torch.int32 or cursor != torch.int32:
        raise ValueError(f"decode_attend: q {q.dtype} and k {k} must agree, pos {pos} and cursor {cursor} be int32")
