"""Our Triton kernel: every call that the op's Triton implementation takes."""

from __future__ import annotations

import torch
from kvpass.kernels.prefill_attend.providers.call import Call, Facts
from kvpass.kernels.prefill_attend.triton_call import shared
from kvpass.kernels.prefill_attend.triton_kernel import attend_kernel
from kvpass.kernels.triton_shared.triton_launch import (
    Target,
    block_sizes,
    blocks,
    launch,
    power_of_two,
    rows_last,
    target,
)
from torch import Tensor


def supports(facts: Facts) -> bool:
    """Everything."""
    return True


def enabled() -> bool:
    """Always: it is why the op's Triton implementation was chosen."""
    return True


def attend(call: Call) -> tuple[Tensor, Tensor]:
    """See `kvpass.kernels.prefill_attend.providers`; out is [B, S, Hq, Dv] in memory. Knows sinks and tokens."""
    batch, heads, queries, _ = call.q.shape
    out = call.q.new_empty(batch, queries, heads, call.v.shape[3]).transpose(1, 2)
    lse = call.q.new_empty(batch, heads, queries, dtype=torch.float32)
    _run(call, out, lse, mend=False)
    return out, lse


def mend(call: Call, out: Tensor, lse: Tensor) -> None:
    """Correct in place what was computed as if all columns held tokens: queries whose padding the words do not hide.

    Right before are the queries that are no padding themselves in rows that begin with a token and have no holes (if
    they see later keys too: in rows without padding). Their blocks of queries are left alone.
    """
    _run(call, out, lse, mend=True)


def averages_blind(call: Call) -> bool:
    """Whether queries that see nothing get the mean of all values here: if words say so, and no mask hides more."""
    other = call.pos, call.survey, call.softmax.sinks
    return call.shown.sees.mean and call.shown.tokens is not None and all(x is None for x in other)


def _run(call: Call, out: Tensor, lse: Tensor, mend: bool) -> None:
    batch, heads, queries, dim = out.shape
    v, sinks, survey = call.v, call.softmax.sinks, call.survey
    mean = v.mean(2, dtype=torch.float32) if averages_blind(call) else None
    wide = power_of_two(dim, 16)
    widest = power_of_two(max(dim, call.q.shape[3]), 16)
    size = config(widest, out.element_size(), survey is not None, target(out.device))
    launch(
        attend_kernel,
        (batch * heads, blocks(queries, size["BM"])),
        out.device,
        **shared(call, lse),
        **size,
        **{f"s_v{d}": v.stride(i) for i, d in enumerate("bhl")},
        **{f"s_o{d}": out.stride(i) for i, d in enumerate("bhs")},
        p_v=v,
        p_span=None if survey is None else survey.queries,
        p_sinks=None if sinks is None else rows_last(sinks),
        p_out=out,
        HQ=heads,
        G=heads // v.shape[1],
        spanning=1 if survey is None else survey.queries.shape[1],
        DV=dim,
        BDV=wide,
        SINKS=sinks is not None,
        MEND=mend,
        MEAN=mean is not None,
        p_mean=mean,
        SPLIT=out.element_size() <= 2 or target(out.device).kind == "interpret",  # float32 would spill
    )


def config(dim: int, bytes_each: int, masked: bool, on: Target) -> dict[str, int]:
    """Block sizes of attend_kernel (BM queries stay, BN keys stream) by padded head dim, element size, and whether a
    mask is read.

    Without a mask those of half precision up to heads of 128 on sm_90 are the fastest measured on an H200
    (docs/gpu.md); others were chosen so that nothing spills.
    """
    if on.kind == "interpret":
        return block_sizes(32, 16, 4, 1)
    if on.kind == "hip":
        wide = block_sizes(128, 32, 8, 1) if dim <= 128 and not masked else block_sizes(64, 32, 4, 1)
        return block_sizes(32, 32, 4, 1) if bytes_each > 2 else block_sizes(128, 64, 8, 1) if dim <= 64 else wide
    if bytes_each > 2 and masked and on.arch >= 100 and dim <= 64:
        return block_sizes(64, 16, 8, 2)
    if bytes_each > 2:
        wide = block_sizes(32, 32, 8, 2) if dim <= 128 else block_sizes(16, 32, 8, 1)
        return block_sizes(64, 16, 4, 2) if dim <= 64 else wide
    if dim > 128:
        return block_sizes(64, 32, 8, 3 if on.roomy else 2)
    if on.arch >= 90 and not masked:
        return block_sizes(64, 64, 4, 3)
    if on.arch >= 100:
        return block_sizes(64, 32, 8, 2)
    if dim <= 64:
        return block_sizes(128, 64, 8, 3)
    return block_sizes(128, 32, 8, 3) if on.arch >= 90 else block_sizes(64, 32, 8, 2)
