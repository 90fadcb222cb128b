"""select_slots: which keys stay. The reference is the meaning; triton runs on CUDA and ROCm."""

from __future__ import annotations

import torch
from kvpass.kernels.choose import kernel
from torch import Tensor


def select_slots(score: Tensor, cursor: Tensor, capacity: int) -> Tensor:
    """Indices of the LIVE best keys of each (b, KV head), ascending, then -1.

    score float32 [B, Hkv, L] (higher = keep), cursor int32 [B, Hkv, 4] (its LIVE says how many) -> int32
    [B, Hkv, capacity]. Equal scores: the lower index stays. LIVE must not exceed capacity or L (not checked: it
    would cost a device sync). Raises ValueError on wrong shapes or dtypes.
    """
    if score.dim() != 3 or score.dtype != torch.float32:
        raise ValueError(f"select_slots: score must be float32 [B, Hkv, L], got {score.dtype} {list(score.shape)}")
    if cursor.shape[:2] != score.shape[:2] or cursor.shape[2] not in (4, 6) or cursor.dtype != torch.int32:
        raise ValueError(f"select_slots: cursor must be int32 [B, Hkv, 4], got {cursor.dtype} {list(cursor.shape)}")
    chosen: Tensor = kernel("select_slots", score.device, cursor)(score, cursor, capacity)
    return chosen
