"""prefill_attend in Triton. Tested in the interpreter and on an H200 (docs/gpu.md); compiled ahead of time too."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from kvpass.kernels.attention.observation import Observation, emission, emitted
from kvpass.kernels.choose import WIDEST
from kvpass.kernels.rule import Rule
from kvpass.kernels.triton_shared.triton_launch import (
    Target,
    blocks,
    check_head_dims,
    launch,
    mask_arguments,
    power_of_two,
    precision,
    rows_last,
    target,
)
from torch import Tensor

from .triton_kernel import attend_kernel, statistics_kernel
from .triton_survey import TILE, survey_kernel

_TILE = int(TILE.value)


def supports(q: Tensor, rule: str) -> bool:
    """Attention's sums, squares and counts, of heads that fit into shared memory."""
    return q.shape[3] <= WIDEST and set(emitted(Rule.parse(rule))) <= {"sum", "sumsq", "count"}


def prefill_attend_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    rule: str,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kvpass.kernels.prefill_attend.prefill_attend`. Saves a log-sum-exp [B, Hq, S]; no S x L matrix exists."""
    check_head_dims(q.shape[3], v.shape[3])
    plan = Rule.parse(rule)
    batch, heads, queries, dim = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    q, k, v = rows_last(q), rows_last(k), rows_last(v)
    pos = None if pos is None else pos.contiguous()
    survey = _survey(q, k, pos, mask)
    out = q.new_empty(batch, heads, queries, v.shape[3])
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    shared: dict[str, Any] = {
        **mask_arguments(mask),
        **{f"s_q{d}": q.stride(i) for i, d in enumerate("bhs")},
        **{f"s_k{d}": k.stride(i) for i, d in enumerate("bhl")},
        "p_q": q,
        "p_k": k,
        "p_pos": pos,
        "p_lse": lse,
        "scale": scale,
        "S": queries,
        "L": length,
        "D": dim,
        "BD": power_of_two(dim, 16),
        "CAUSAL": causal,
        "POS": pos is not None,
        "PRECISION": precision(target(q.device)),
        "SOFTCAP": float(softcap),
    }
    _attend(v, out, survey, sinks, shared)
    watched = plan[Observation].queries != 0 and bool(emitted(plan))
    make = q.new_empty if watched else q.new_zeros
    stats = make(len(emitted(plan)), batch, kv_heads, length, dtype=torch.float32)
    if watched:
        _observe(stats, survey, plan, shared)
    valid = survey.valid.view(torch.bool) if mask is not None else survey.valid
    return out, stats, valid


class _Survey(NamedTuple):
    """What one look at the mask tells; spans are None without a mask."""

    valid: Tensor
    """[B, S]: bool without a mask, else uint8."""
    end: Tensor | None
    """int32 [B]: one past the index of the last valid token of the call."""
    queries: Tensor | None
    """int32 [B, H, tiles, 2]: key tiles that a query tile can see (`triton_survey.covered`)."""
    keys: Tensor | None
    """int32 [B, HK, tiles, 2]: query tiles that can see a key tile."""


def _survey(q: Tensor, k: Tensor, pos: Tensor | None, mask: Tensor | None) -> _Survey:
    batch, heads, queries, _ = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    if mask is None:
        return _Survey(torch.ones(batch, queries, dtype=torch.bool, device=q.device), None, None, None)
    differ = heads if mask.shape[1] > 1 else 1 if pos is None else kv_heads
    kv_differ = 1 if differ == 1 else kv_heads
    tiles_q, tiles_k = blocks(queries, _TILE), blocks(length, _TILE)
    middle, last = batch + batch * differ * tiles_q * 2, batch * kv_differ * tiles_k * 2
    zeros = torch.zeros(middle + last, dtype=torch.int32, device=q.device)
    end, by_query, by_key = zeros[:batch], zeros[batch:middle], zeros[middle:]
    valid = torch.zeros(batch, queries, dtype=torch.uint8, device=q.device)
    arguments = mask_arguments(mask)
    launch(
        survey_kernel,
        (batch * differ, tiles_q, tiles_k),
        q.device,
        **arguments,
        p_pos=pos,
        p_valid=valid,
        p_end=end,
        p_qspan=by_query,
        p_kspan=by_key,
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
    return _Survey(valid, end, by_query.view(batch, differ, tiles_q, 2), by_key.view(batch, kv_differ, tiles_k, 2))


def _attend(v: Tensor, out: Tensor, survey: _Survey, sinks: Tensor | None, shared: dict[str, Any]) -> None:
    """The first pass: fills out and the log-sum-exp."""
    batch, heads, queries, dim = out.shape
    spans = survey.queries
    wide = power_of_two(dim, 16)
    size = _attend_config(max(shared["BD"], wide), out.element_size(), target(out.device))
    launch(
        attend_kernel,
        (batch * heads, blocks(queries, size["BM"])),
        out.device,
        **shared,
        **size,
        p_v=v,
        p_span=spans,
        p_sinks=None if sinks is None else sinks.contiguous(),
        p_out=out,
        s_vb=v.stride(0),
        s_vh=v.stride(1),
        s_vl=v.stride(2),
        HQ=heads,
        G=heads // v.shape[1],
        spanning=1 if spans is None else spans.shape[1],
        tiles=0 if spans is None else spans.shape[2],
        DV=dim,
        BDV=wide,
        SINKS=sinks is not None,
    )


def _observe(stats: Tensor, survey: _Survey, plan: Rule, shared: dict[str, Any]) -> None:
    """The second pass: fills the statistics [N, B, Hkv, L]."""
    _, batch, heads, length = stats.shape
    spans, q = survey.keys, shared["p_q"]
    size = _statistics_config(shared["BD"], q.element_size(), target(q.device))
    launch(
        statistics_kernel,
        (batch * heads, blocks(length, size["BN"])),
        q.device,
        **shared,
        **size,
        p_span=spans,
        p_valid=None if spans is None else survey.valid,
        p_start=_start(survey, plan),
        p_end=survey.end,
        p_stats=stats,
        HKV=heads,
        spanning=1 if spans is None else spans.shape[1],
        tiles=0 if spans is None else spans.shape[2],
        G=q.shape[1] // heads,
        WINDOW=plan[Observation].queries,
        MEAN=plan[Observation].group == "mean",
        SUM=emission(plan, "sum"),
        SUMSQ=emission(plan, "sumsq"),
        COUNT=emission(plan, "count"),
    )


def _start(survey: _Survey, plan: Rule) -> Tensor | None:
    """Index of the first valid query of the observation window, int32 [B]; None without a window or a mask."""
    if survey.end is None or plan[Observation].queries < 0:
        return None
    later = survey.valid.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
    return (later > plan[Observation].queries).sum(-1, dtype=torch.int32)


def _config(bm: int, bn: int, warps: int, stages: int) -> dict[str, int]:
    return {"BM": bm, "BN": bn, "num_warps": warps, "num_stages": stages}


def _attend_config(dim: int, bytes_each: int, on: Target) -> dict[str, int]:
    """Pinned block sizes of attend_kernel (BM queries stay, BN keys stream) by padded head dim and element size.

    Chosen so that nothing spills when compiled with a mask; not tuned on hardware.
    """
    if on.kind == "interpret":
        return _config(32, 16, 4, 1)
    if on.kind == "hip":
        wide = _config(128, 32, 8, 1) if dim <= 128 else _config(64, 32, 4, 1)
        return _config(32, 32, 4, 1) if bytes_each > 2 else _config(128, 64, 8, 1) if dim <= 64 else wide
    if bytes_each > 2:
        wide = _config(32, 32, 8, 2) if dim <= 128 else _config(16, 32, 8, 1)
        return _config(64, 16, 4, 2) if dim <= 64 else wide
    if dim <= 64:
        return _config(128, 64, 8, 3)
    if dim > 128:
        return _config(64, 32, 8, 3 if on.roomy else 2)
    return _config(128, 32, 8, 3) if on.arch >= 90 else _config(64, 32, 8, 2)


def _statistics_config(dim: int, bytes_each: int, on: Target) -> dict[str, int]:
    """Pinned block sizes of statistics_kernel (BN keys stay, BM queries stream), chosen likewise."""
    if on.kind == "interpret":
        return _config(16, 32, 4, 1)
    if on.kind == "hip":
        small = _config(64, 64, 4, 1) if dim <= 64 else _config(16, 64, 8, 1)
        return _config(32, 32, 4, 1) if bytes_each > 2 else small
    if bytes_each > 2:
        return _config(16, 64, 4, 2) if dim <= 128 else _config(16, 32, 8, 1)
    return _config(64 if dim <= 64 else 32, 64, 4, 2)
