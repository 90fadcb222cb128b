"""compact_slots in Triton. Tested in the interpreter and on an H200 (docs/gpu.md); compiled ahead of time too."""

from __future__ import annotations

from collections.abc import Sequence

from kvpass.kernels.choose import WIDEST
from kvpass.kernels.slots.ragged import is_ragged
from kvpass.kernels.slots.state import FIELDS, State
from kvpass.kernels.triton_shared.triton_launch import blocks, launch, power_of_two, rows_last
from torch import Tensor

from .triton_kernel import compact_kernel


def supports(keys: Sequence[Tensor | None], cursor_new: Tensor, out: State) -> bool:
    """Heads that are equally long, of sizes that fit into shared memory, and the fields that every state has."""
    wide = out.k.shape[3] > WIDEST or out.v.shape[3] == 0
    return out.fields == FIELDS and keys[-1] is not None and not (wide or is_ragged(cursor_new))


def compact_slots_triton(keys: Sequence[Tensor | None], idx: Tensor, cursor_new: Tensor, out: State) -> None:
    """See `kvpass.kernels.compact_slots.compact_slots`. The state tensors are contiguous."""
    given_k, given_v, given_pos, given_stats = keys
    assert given_k is not None
    assert given_v is not None
    assert given_stats is not None
    k, v = rows_last(given_k), rows_last(given_v)
    (batch, heads, length, dim), slots, wide = k.shape, out.slots, v.shape[3]
    size = 32 if max(dim, wide) > 128 else 64
    launch(
        compact_kernel,
        (batch * heads, blocks(slots, size)),
        k.device,
        p_k=k,
        p_v=v,
        p_pos=None if given_pos is None else given_pos.contiguous(),
        p_stats=given_stats.contiguous(),
        p_idx=idx.contiguous(),
        p_cursor=cursor_new.contiguous(),
        **{f"p_{field.name}out": tensor for field, tensor in zip(out.fields, out.tensors(), strict=True)},
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
        N=given_stats.shape[0],
        POS=given_pos is not None,
        D=dim,
        DV=wide,
        BD=power_of_two(dim),
        BDV=power_of_two(wide),
        BLOCK=size,
        num_warps=4,
    )
