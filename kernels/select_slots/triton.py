"""select_slots in Triton. Tested in the interpreter and on an H200 (docs/gpu.md); compiled ahead of time too."""

from __future__ import annotations

from kvpass.kernels.slots.ragged import is_ragged
from kvpass.kernels.triton_shared.triton_launch import launch, power_of_two
from torch import Tensor

from .triton_kernel import select_kernel


def supports(cursor: Tensor) -> bool:
    """Heads that are equally long."""
    return not is_ragged(cursor)


def select_slots_triton(score: Tensor, cursor: Tensor, capacity: int) -> Tensor:
    """See `kvpass.kernels.select_slots.select_slots`."""
    batch, heads, length = score.shape
    idx = cursor.new_empty(batch, heads, capacity)
    launch(
        select_kernel,
        (batch * heads,),
        score.device,
        p_score=score.contiguous(),
        p_cursor=cursor.contiguous(),
        p_idx=idx,
        L=length,
        capacity=capacity,
        BLOCK=min(power_of_two(length, 128), 4096),
        num_warps=8,
    )
    return idx
