"""compact_slots in Triton. Tested in the interpreter and on an H200 (docs/gpu.md); compiled ahead of time too."""

from __future__ import annotations

from kvpass.kernels.triton_shared.triton_launch import blocks, launch, power_of_two, rows_last
from torch import Tensor

from .triton_kernel import compact_kernel


def compact_slots_triton(
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    stats: Tensor,
    idx: Tensor,
    cursor_new: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    pos_out: Tensor,
    stats_out: Tensor,
    cursor_out: Tensor,
) -> None:
    """See `kvpass.kernels.compact_slots.compact_slots`. The state tensors (*_out) are contiguous."""
    batch, heads, length, dim = k.shape
    slots, wide = k_out.shape[2], v.shape[3]
    k, v = rows_last(k), rows_last(v)
    size = 32 if max(dim, wide) > 128 else 64
    launch(
        compact_kernel,
        (batch * heads, blocks(slots, size)),
        k.device,
        p_k=k,
        p_v=v,
        p_pos=None if pos is None else pos.contiguous(),
        p_stats=stats.contiguous(),
        p_idx=idx.contiguous(),
        p_cursor=cursor_new.contiguous(),
        p_kout=k_out,
        p_vout=v_out,
        p_posout=pos_out,
        p_statsout=stats_out,
        p_cursorout=cursor_out,
        s_kb=k.stride(0),
        s_kh=k.stride(1),
        s_kl=k.stride(2),
        s_vb=v.stride(0),
        s_vh=v.stride(1),
        s_vl=v.stride(2),
        HKV=heads,
        L=length,
        C=slots,
        capacity=idx.shape[2],
        N=stats.shape[0],
        POS=pos is not None,
        D=dim,
        DV=wide,
        BD=power_of_two(dim),
        BDV=power_of_two(wide),
        BLOCK=size,
        num_warps=4,
    )
