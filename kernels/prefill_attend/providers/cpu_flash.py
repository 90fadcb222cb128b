"""Torch's flash kernel for CPUs: beside our kernel in the interpreter, where a provider is tested without a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kvpass.kernels.prefill_attend.providers.call import Call, Facts
from torch import Tensor


def supports(facts: Facts) -> bool:
    """The CPU's tensors, plain visibility."""
    return facts.kind == "interpret" and facts.plain


def enabled() -> bool:
    """Every torch has it."""
    return True


def attend(call: Call) -> tuple[Tensor, Tensor]:
    """See `kvpass.kernels.prefill_attend.providers`. It wants one head size for k and v."""
    wide = call.v.shape[3]
    dim = max(call.q.shape[3], wide)
    q, k, v = (x if x.shape[3] == dim else F.pad(x, (0, dim - x.shape[3])) for x in (call.q, call.k, call.v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, call.shown.sees.causal, scale=call.softmax.scale
    )
    return out[..., :wide], lse.contiguous()
