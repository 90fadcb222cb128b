"""cuDNN's fused attention, through torch. Groups of heads are its own affair: nothing is repeated or copied.

What it takes is what torch asks of it (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp). A length that it has not
seen costs it a plan, once, as it does the unmodified model.
"""

from __future__ import annotations

from functools import cache

import torch
from kvpass.kernels.prefill_attend.providers.call import HALF, Call, Facts
from torch import Tensor


def supports(facts: Facts) -> bool:
    """Half precision on NVIDIA, heads of up to 128, plain visibility."""
    dims = (facts.dim, facts.value_dim)
    fits = all(d <= 128 and d % 8 == 0 for d in dims) and facts.queries > 1
    return facts.kind == "cuda" and facts.arch >= 80 and facts.dtype in HALF and fits and facts.plain


@cache
def _there() -> bool:
    return torch.backends.cudnn.is_available() and (torch.backends.cudnn.version() or 0) >= 90000


def enabled() -> bool:
    """Whether this torch has it, and nobody has turned it off."""
    return _there() and torch.backends.cuda.cudnn_sdp_enabled() and not torch.are_deterministic_algorithms_enabled()


def attend(call: Call) -> tuple[Tensor, Tensor]:
    """See `kvpass.kernels.prefill_attend.providers`. Raises RuntimeError if cuDNN has no plan."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        call.q, call.k, call.v, None, True, 0.0, call.shown.sees.causal, False, scale=call.softmax.scale
    )
    return out, lse.view(out.shape[:3])
