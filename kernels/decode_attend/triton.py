"""decode_attend in Triton. Tested in the interpreter and on an H200 (docs/gpu.md); compiled ahead of time too.

Three launches, four with a scope: partial attention over splits of the slots (reads K and V once per KV head), their
sum with the statistics, and the victim. Grids and scratch depend on shapes alone and nothing is read back, so a CUDA
graph can hold them.
"""

from __future__ import annotations

from typing import Any

import torch
from kvpass.kernels.attention.softmax import Softmax
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

from .triton_kernel import combine_kernel, split_kernel
from .triton_victim import spread_kernel, victim_kernel

_SCORES = {"position": 0, "sum": 1, "mean": 2}


def decode_attend_triton(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    mask: Tensor | None,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    stats: Tensor,
    cursor: Tensor,
    position: int,
    scale: float,
    rule: str,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """See `kvpass.kernels.decode_attend.decode_attend`. The state tensors are contiguous."""
    check_head_dims(q.shape[3], v.shape[3])
    plan, softmax = Rule.parse(rule).of_steps, Softmax(scale, sinks, softcap)
    hidden = mask_arguments(mask)
    hidden.pop("s_mq")
    heads = 1 if mask is None else mask.shape[1]
    shared: dict[str, Any] = {
        **hidden,
        "mask_heads": heads,
        "HEADS": power_of_two(heads),
        "p_stats": stats,
        "p_cursor": cursor,
        "position": position,
        "C": k.shape[2],
        "HKV": k.shape[1],
    }
    out = _attend(rows_last(q), rows_last(k_new), rows_last(v_new), k, v, pos, softmax, plan, shared)
    _evict(pos, stats, cursor, plan, shared)
    return out


def _attend(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    softmax: Softmax,
    plan: Rule,
    shared: dict[str, Any],
) -> Tensor:
    """Append, attend, update the statistics; returns out [B, Hq, 1, Dv]."""
    batch, kv_heads, slots, dim = k.shape
    heads, wide = q.shape[1], v.shape[3]
    group = heads // kv_heads
    observes = bool(plan.stats) and plan.decode != "none"
    size = _config(max(dim, wide), q.element_size(), target(q.device))
    splits = _splits(batch * kv_heads, slots, size["BN"], target(q.device))
    each = batch * heads * splits
    scratch = torch.empty(each * (wide + 2), dtype=torch.float32, device=q.device)
    acc, best, total = scratch[: each * wide], scratch[each * wide : -each], scratch[-each:]
    logits = q.new_empty(batch, heads, slots, dtype=torch.float32) if observes else None
    parts: dict[str, Any] = {"p_logits": logits, "p_max": best, "p_sum": total, "p_acc": acc, "splits": splits, **size}
    parts |= {"G": group, "GP": 1 if group == 1 else power_of_two(group, 16), "DV": wide, "BDV": power_of_two(wide, 16)}
    launch(
        split_kernel,
        (batch * kv_heads, splits),
        q.device,
        **shared,
        **parts,
        p_q=q,
        p_knew=k_new,
        p_vnew=v_new,
        p_k=k,
        p_v=v,
        p_pos=pos,
        s_qb=q.stride(0),
        s_qh=q.stride(1),
        s_kb=k_new.stride(0),
        s_kh=k_new.stride(1),
        s_vb=v_new.stride(0),
        s_vh=v_new.stride(1),
        scale=softmax.scale,
        D=dim,
        BD=power_of_two(dim, 16),
        N=len(plan.stats),
        LOGITS=observes,
        SOFTCAP=float(softmax.softcap),
        PRECISION=precision(target(q.device)),
    )
    out = q.new_empty(batch, heads, 1, wide)
    launch(
        combine_kernel,
        (batch * kv_heads, splits),
        q.device,
        **shared,
        **parts,
        p_sinks=None if softmax.sinks is None else softmax.sinks.contiguous(),
        p_out=out,
        BS=power_of_two(splits),
        BC=max(1, min(power_of_two(splits), 4096 // parts["BDV"])),
        SINKS=softmax.sinks is not None,
        ADD=plan.decode == "add",
        MEAN=plan.group == "mean",
        SUM=plan.stat("sum") if observes else -1,
        SUMSQ=plan.stat("sumsq") if observes else -1,
        COUNT=plan.stat("count") if observes else -1,
    )
    return out


def _evict(pos: Tensor, stats: Tensor, cursor: Tensor, plan: Rule, shared: dict[str, Any]) -> None:
    """Advance the cursor and free the victim's slot."""
    batch, kv_heads, slots = pos.shape
    scoped = plan.scope_num > 0 and plan.evicts
    spread = torch.empty(pos.shape, dtype=torch.float32, device=pos.device) if scoped else None
    block = min(power_of_two(slots, 128), 2048)
    names = ("slots", "num", "den", "floor", "sinks", "recent", "recent_num", "recent_den")
    budget: dict[str, Any] = {name: getattr(plan, name) for name in names}
    budget |= {"p_pos": pos, "p_spread": spread, "SUM": plan.stat("sum"), "COUNT": plan.stat("count"), "BLOCK": block}
    if scoped:
        plain = {name: shared[name] for name in ("p_stats", "p_cursor", "position", "C", "HKV")}
        launch(
            spread_kernel,
            (batch * kv_heads, blocks(slots, block)),
            pos.device,
            **plain,
            **budget,
            SUMSQ=plan.stat("sumsq"),
            num_warps=4,
            enable_fp_fusion=False,
        )
    launch(
        victim_kernel,
        (batch * kv_heads,),
        pos.device,
        **shared,
        **budget,
        scope_num=plan.scope_num,
        scope_den=plan.scope_den,
        SCORE=_SCORES[plan.score],
        ALL=plan.heads == "all" and plan.score != "position",
        SCOPE=scoped,
        EVICTS=plan.evicts,
        num_warps=4,
        enable_fp_fusion=False,
    )


def _splits(rows: int, slots: int, block: int, on: Target) -> int:
    """Programs per (b, KV head): to fill the device twice, with two blocks or more each; a power of two <= 64."""
    wanted = max(1, min(2 * on.cores // rows, slots // (2 * block), 64))
    return 1 << (wanted.bit_length() - 1)


def _config(dim: int, bytes_each: int, on: Target) -> dict[str, int]:
    """Pinned block size of split_kernel and combine_kernel by head dim and element size. Not tuned on hardware."""
    if on.kind == "interpret":
        return {"BN": 16, "num_warps": 4, "num_stages": 1}
    large = dim > 128 or bytes_each > 2
    huge = dim > 128 and bytes_each > 2
    stages = 1 if on.kind == "hip" else 3 if on.roomy and not huge else 2
    return {"BN": 16 if huge else 32 if large else 64, "num_warps": 4, "num_stages": stages}
