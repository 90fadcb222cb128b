"""prefill_attend on CPUs in one pass of C++ (`kvpass.kernels.native`): attention, and what each key gets of it.

What each query sees is an interval of positions, and a key that holds no token stands nowhere. A call that says more (a
mask that is no words, biases of slots, memory keys) is left to the reference.
"""

from __future__ import annotations

from ctypes import Structure, addressof, c_char_p, c_float, c_int32, c_void_p
from functools import lru_cache
from struct import Struct

import torch
from kvpass.kernels.attention.observation import EVEN, STATISTICS, Observation, emission, emitted
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.attention.visibility import END, FIRST, Sees, Shown
from kvpass.kernels.native.library import KINDS, function
from kvpass.kernels.prefill_attend.reference import watched_rows
from kvpass.kernels.rule import Rule
from torch import Tensor

HIDDEN = -(1 << 30)
"""Where a key stands that holds no token; below what any query sees."""

FARTHEST = (1 << 31) - 1


class Watch(Structure):
    """`struct Watch` of prefill.h."""

    _fields_ = (
        *((name, c_int32) for name in (*STATISTICS, "statistics", "mean")),
        *((name, c_float) for name in ("even", "factor", "softcap")),
    )  # fmt: skip


ARGUMENTS = Struct("10P20q")
"""`struct Prompt` of prefill.h."""


def prefill_attend_native(
    q: Tensor, k: Tensor, v: Tensor, pos: Tensor | None, shown: Shown, softmax: Softmax, rule: Rule
) -> tuple[Tensor, Tensor, Tensor] | None:
    """See `kvpass.kernels.prefill_attend.prefill_attend`. None: this is not for it."""
    if shown.mask is not None or shown.bias is not None or softmax.beside is not None or q.dtype not in KINDS:
        return None
    run = None if q.dtype == torch.bfloat16 and _multiplies_tiles() else function("prefill", KIND=KINDS[q.dtype])
    if run is None:
        return None
    run.argtypes, run.restype = [c_void_p, c_char_p], None
    (batch, heads, queries, dim), (_, kv_heads, keys, wide) = q.shape, v.shape
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    valid = shown.arrived(batch, q.device)
    watched = watched_rows(valid, rule)
    place, (low, high) = _places(keys, pos, shown), _intervals(shown.sees, queries, shown.position)
    sinks = None if softmax.sinks is None else softmax.sinks.float().contiguous()
    words = Watch(
        *((emission(rule, name) for name in STATISTICS) if watched is not None else [-1] * len(STATISTICS)),
        len(emitted(rule)) if watched is not None else 0, rule[Observation].group == "mean",
        EVEN, softmax.factor, softmax.softcap,
    )  # fmt: skip
    out = torch.empty(batch, queries, heads, wide, dtype=torch.float32)
    stats = torch.zeros(len(emitted(rule)), batch, kv_heads, keys, dtype=torch.float32)
    at = [0 if x is None else x.data_ptr() for x in (q, k, v, place, low, high, watched, sinks, out, stats)]
    given = ARGUMENTS.pack(
        *at, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_steps(place),
        batch, kv_heads, heads // kv_heads, queries, keys, dim, wide, shown.position, torch.get_num_threads(),
    )  # fmt: skip
    run(addressof(words), given)
    return out.to(q.dtype).transpose(1, 2), stats, valid


def _places(keys: int, pos: Tensor | None, shown: Shown) -> Tensor:
    """Where keys stand that hold a token, else `HIDDEN`: int32 [1 or B, 1 or Hkv, L]."""
    where = torch.arange(keys, dtype=torch.int32)[None, None] if pos is None else pos
    seen = shown._replace(sees=Sees()).keys(where, 0, 1)[:, :, 0]
    if shown.tokens is None and shown.bounds is not None:
        bounds = shown.bounds[:, None, None]
        seen = seen & (where >= bounds[..., FIRST]) & (where < bounds[..., END])
    return torch.where(seen, where, HIDDEN).contiguous()


def _steps(place: Tensor) -> tuple[int, int]:
    """From one sequence, and from one head, to the next."""
    batch, heads, keys = place.shape
    return keys * heads if batch > 1 else 0, keys if heads > 1 else 0


@lru_cache(maxsize=1)
def _multiplies_tiles() -> bool:
    """Whether this CPU has AMX, by which torch's own attention of bfloat16 should be faster; not measured."""
    return bool(torch.cpu._is_amx_tile_supported())


@lru_cache(maxsize=8)
def _intervals(sees: Sees, queries: int, position: int) -> tuple[Tensor, Tensor]:
    """The lowest and the highest position that each query sees, int32 [S]; the same for all layers of a call."""
    with torch.inference_mode(False):
        place = torch.arange(queries, dtype=torch.int32)
        at = place + position
        low, high = torch.zeros_like(at), torch.full_like(at, FARTHEST)
        if sees.causal:
            high = place if sees.corner else at
        if sees.window:
            low = (at - sees.window + 1).clamp(min=0)
        if sees.chunk:
            first = at // sees.chunk * sees.chunk
            low, high = torch.maximum(low, first), torch.minimum(high, first + sees.chunk - 1)
    return low, high
