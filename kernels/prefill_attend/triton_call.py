"""A call of prefill_attend as its Triton kernels take it: what they all are given, and one look at a mask."""

from __future__ import annotations

from typing import Any

import torch
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.attention.visibility import Shown
from kvpass.kernels.prefill_attend.providers.call import Call, Survey
from kvpass.kernels.triton_shared.triton_launch import (
    blocks,
    launch,
    mask_arguments,
    power_of_two,
    precision,
    rows_last,
    target,
)
from torch import Tensor

from .triton_survey import TILE, survey_kernel

_TILE = int(TILE.value)


def shared(call: Call, lse: Tensor) -> dict[str, Any]:
    """Arguments of both kernels."""
    q, dim = call.q, call.q.shape[3]
    return {
        **mask_arguments(call.shown.mask),
        **_words(call.shown, call.pos is not None),
        **{f"s_q{d}": q.stride(i) for i, d in enumerate("bhs")},
        **{f"s_k{d}": call.k.stride(i) for i, d in enumerate("bhl")},
        "p_q": q,
        "p_k": call.k,
        "p_pos": call.pos,
        "p_lse": lse,
        "p_whole": None if call.survey is None else call.survey.whole,
        "tiles_q": blocks(q.shape[2], _TILE),
        "tiles_k": blocks(call.k.shape[2], _TILE),
        "scale": call.softmax.scale,
        "S": q.shape[2],
        "L": call.k.shape[2],
        "D": dim,
        "BD": power_of_two(dim, 16),
        "PRECISION": precision(target(q.device)),
        "SOFTCAP": float(call.softmax.softcap),
    }


def _words(shown: Shown, looked_up: bool) -> dict[str, Any]:
    """Arguments that say who sees whom, beside a mask."""
    sees, tokens, bounds = shown.sees, shown.tokens, shown.bounds
    return {
        "p_tokens": None if tokens is None else rows_last(tokens).view(torch.uint8),
        "p_bounds": None if tokens is None or bounds is None else rows_last(bounds),
        "s_tb": 0 if tokens is None or len(tokens) == 1 else rows_last(tokens).stride(0),
        "s_bb": 0 if bounds is None or len(bounds) == 1 else rows_last(bounds).stride(0),
        "position": shown.position,
        "POS": looked_up,
        "TOKENS": tokens is not None,
        "CAUSAL": 0 if not sees.causal else 2 if sees.corner else 1,
        "WINDOW": sees.window,
        "CHUNK": sees.chunk,
    }


def call_of(q: Tensor, k: Tensor, v: Tensor, pos: Tensor | None, shown: Shown, softmax: Softmax) -> Call:
    """The call with contiguous rows, its mask surveyed."""
    q, k, v = rows_last(q), rows_last(k), rows_last(v)
    pos = None if pos is None else pos.contiguous()
    survey = None if shown.mask is None else _survey(q, k, pos, shown.mask)
    return Call(q, k, v, pos, shown, softmax, survey)


def _survey(q: Tensor, k: Tensor, pos: Tensor | None, mask: Tensor) -> Survey:
    batch, heads, queries, _ = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    differ = heads if mask.shape[1] > 1 else 1 if pos is None else kv_heads
    kv_differ = 1 if differ == 1 else kv_heads
    tiles_q, tiles_k = blocks(queries, _TILE), blocks(length, _TILE)
    middle, last = batch + batch * differ * tiles_q * 2, batch * kv_differ * tiles_k * 2
    zeros = torch.zeros(middle + last, dtype=torch.int32, device=q.device)
    end, by_query, by_key = zeros[:batch], zeros[batch:middle], zeros[middle:]
    valid = torch.zeros(batch, queries, dtype=torch.uint8, device=q.device)
    whole = torch.empty(batch, differ, tiles_q, tiles_k, dtype=torch.uint8, device=q.device)
    launch(
        survey_kernel,
        (batch * differ, tiles_q, tiles_k),
        q.device,
        **mask_arguments(mask),
        p_pos=pos,
        p_valid=valid,
        p_end=end,
        p_qspan=by_query,
        p_kspan=by_key,
        p_whole=whole,
        S=queries,
        L=length,
        H=differ,
        HK=kv_differ,
        HKV=kv_heads,
        tiles_q=tiles_q,
        tiles_k=tiles_k,
        POS=pos is not None,
        num_warps=4,
    )
    spans = by_query.view(batch, differ, tiles_q, 2), by_key.view(batch, kv_differ, tiles_k, 2)
    return Survey(valid, end, *spans, whole)
