"""compact_slots: move the keys that stay into the slots of the state.

The reference is the meaning; triton runs on CUDA and ROCm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvpass.kernels.choose import kernel
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.ragged import is_ragged
from kvpass.kernels.slots.state import Field, State
from torch import Tensor


def compact_slots(
    keys: Sequence[Tensor | None], idx: Tensor, cursor_new: Tensor, state: Sequence[Tensor], rule: str
) -> None:
    """Gather the selected keys into slots 0 .. LIVE-1 of the state, in place.

    keys: for each per-slot field of the state, in order, what the L keys have of it: the field's shape with L for C;
    None for positions if key l is at position l, and for others if they have none: slots then get the field's fill. idx
    int32 [B, Hkv, n] from select_slots, cursor_new int32 [B, Hkv, 4 or 6]. state: the tensors of `State` under the
    rule, with C >= n slots. Positions become -1 beyond LIVE; other fields keep their bytes there. Inputs must not alias
    outputs. Raises ValueError on shapes or dtypes that do not fit.
    """
    out = State.of(state, Rule.parse(rule))
    both = zip(out.per_slot(), keys, strict=True)
    length = next((given.shape[field.rows + 2] for (field, _), given in both if given is not None), 0)
    for (field, target), given in zip(out.per_slot(), keys, strict=True):
        if given is not None:
            _check(field, given, target, length)
    fits = idx.shape[2] <= out.slots or is_ragged(cursor_new)
    if idx.dtype != torch.int32 or idx.shape[:2] != cursor_new.shape[:2] or not fits:
        raise ValueError(f"compact_slots: idx must be int32 [B, Hkv, <= C], got {idx.dtype} {list(idx.shape)}")
    kernel("compact_slots", idx.device, keys, cursor_new, out)(keys, idx, cursor_new, out)


def _check(field: Field, given: Tensor, target: Tensor, length: int) -> None:
    wanted = [length if letter == "C" else n for letter, n in zip(field.dims, target.shape, strict=True)]
    if list(given.shape) != wanted or given.dtype != target.dtype:
        raise ValueError(
            f"compact_slots: {field.name} {given.dtype} {list(given.shape)} of {length} keys does not fit its state "
            f"{target.dtype} {list(target.shape)}"
        )
