"""What a provider of attention is given: a call's tensors, and the facts that a choice may hang on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.attention.visibility import Sees, Shown
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


class Survey(NamedTuple):
    """What one look at the mask tells (`triton_survey`)."""

    valid: Tensor
    """uint8 [B, S]: some query of the call may see it."""
    end: Tensor
    """int32 [B]: one past the index of the last valid token of the call."""
    queries: Tensor
    """int32 [B, H, tiles, 2]: key tiles that a query tile can see."""
    keys: Tensor
    """int32 [B, HK, tiles, 2]: query tiles that can see a key tile."""
    whole: Tensor
    """uint8 [B, H, query tiles, key tiles]: where nothing is hidden, and nothing added."""


class Call(NamedTuple):
    """The tensors of a call, as the op has them; rows of q, k and v are contiguous."""

    q: Tensor
    k: Tensor
    v: Tensor
    pos: Tensor | None
    shown: Shown
    softmax: Softmax
    survey: Survey | None = None
    """None without a mask."""


class Facts(NamedTuple):
    """What is known of a call on the host, without a look at what tensors hold."""

    kind: str
    """cuda, hip, or interpret: the CPU."""
    arch: int
    """Compute capability as in 80, 90; 0 elsewhere."""
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int
    sees: Sees
    tokens: bool
    """Some columns may hold no token."""
    mask: bool
    square: bool
    """No positions are given: key l is at position l, and so is query l."""
    softcap: bool

    @property
    def plain(self) -> bool:
        """Whether each query sees all keys, or all up to its own, but for columns without a token."""
        words = self.sees.causal or self.sees == Sees(mean=self.sees.mean)
        return self.square and words and not (self.mask or self.softcap or self.sees.window or self.sees.chunk)


def facts_of(call: Call, kind: str, arch: int) -> Facts:
    """Those of a call on a device."""
    q, k, shown = call.q, call.k, call.shown
    square = call.pos is None and shown.position == 0
    return Facts(
        kind, arch, q.dtype, len(q), q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], call.v.shape[3],
        shown.sees, shown.tokens is not None, shown.mask is not None, square, call.softmax.softcap > 0,
    )  # fmt: skip
