"""compact_slots: move the keys that stay into the slots of the state.

The reference is the meaning; triton runs on CUDA and ROCm.
"""

from __future__ import annotations

import torch
from kvpass.kernels.choose import WIDEST, kernel
from kvpass.kernels.slots.ragged import is_ragged
from torch import Tensor


def compact_slots(
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
    """Gather the selected keys into slots 0 .. LIVE-1 of the state, in place.

    k [B, Hkv, L, D], v [B, Hkv, L, Dv], pos int32 [B, Hkv, L] or None (key l is at position l), stats float32
    [N, B, Hkv, L], idx int32 [B, Hkv, n] from select_slots, cursor_new int32 [B, Hkv, 4]. The *_out are the five state
    tensors with C >= n slots. `pos_out` becomes -1 beyond LIVE; k, v and statistics beyond LIVE keep their
    bytes. Inputs must not alias outputs. Raises ValueError on shapes or dtypes that do not fit.
    """
    for name, x, out in (("k", k, k_out), ("v", v, v_out)):
        if x.dtype != out.dtype or (*x.shape[:2], x.shape[3]) != (*out.shape[:2], out.shape[3]):
            raise ValueError(
                f"compact_slots: {name} {x.dtype} {list(x.shape)} does not fit its state {out.dtype} {list(out.shape)}"
            )
    if stats.shape[0] != stats_out.shape[0] or stats.shape[-1] != k.shape[2]:
        raise ValueError(f"compact_slots: stats {list(stats.shape)} do not fit stats_out {list(stats_out.shape)}")
    fits = idx.shape[2] <= k_out.shape[2] or is_ragged(cursor_new)
    if idx.dtype != torch.int32 or idx.shape[:2] != k.shape[:2] or not fits:
        raise ValueError(f"compact_slots: idx must be int32 [B, Hkv, <= C], got {idx.dtype} {list(idx.shape)}")
    run = kernel("compact_slots", k.device, wide=k.shape[3] > WIDEST or v.shape[3] == 0 or is_ragged(cursor_new))
    run(k, v, pos, stats, idx, cursor_new, k_out, v_out, pos_out, stats_out, cursor_out)
