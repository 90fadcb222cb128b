"""FlashAttention 2, through torch. Groups of heads are its own affair: nothing is repeated or copied."""

from __future__ import annotations

import torch
from kvpass.kernels.prefill_attend.providers.call import HALF, Call, Facts
from torch import Tensor


def supports(facts: Facts) -> bool:
    """Half precision on NVIDIA, heads of up to 256, as wide in k as in v, plain visibility."""
    fits = facts.dim == facts.value_dim and facts.dim <= 256 and facts.dim % 8 == 0 and facts.queries > 1
    return facts.kind == "cuda" and facts.arch >= 80 and facts.dtype in HALF and fits and facts.plain


def enabled() -> bool:
    """Whether this torch has it, and nobody has turned it off."""
    return torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled()


def attend(call: Call) -> tuple[Tensor, Tensor]:
    """See `kvpass.kernels.prefill_attend.providers`."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        call.q, call.k, call.v, 0.0, call.shown.sees.causal, False, scale=call.softmax.scale
    )
    return out, lse.contiguous()
