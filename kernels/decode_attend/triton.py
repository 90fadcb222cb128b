"""decode_attend in Triton. Tested in the interpreter and on an H200 (docs/gpu.md); compiled ahead of time too.

Three launches, four with a scope: partial attention over splits of the slots (reads K and V once per KV head), their
sum with the statistics, and the victim. Grids and scratch depend on shapes alone and nothing is read back, so a CUDA
graph can hold them.
"""

from __future__ import annotations

from typing import Any

import torch
from kvpass.kernels.attention.observation import Observation
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.budget import Budget
from kvpass.kernels.choose import WIDEST
from kvpass.kernels.decode_attend.call import Call, Token
from kvpass.kernels.rank.criterion import Ranking, Scope
from kvpass.kernels.rank.layer import Layer
from kvpass.kernels.rank.places import Protected
from kvpass.kernels.rank.scored import Scoring
from kvpass.kernels.rank.smooth import Pool
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.state import FIELDS, State
from kvpass.kernels.slots.statistics import Statistics, stat
from kvpass.kernels.timing import Timing
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
from .triton_victim import deviation_kernel, victim_kernel

_SCORES = {"position": 0, "sum": 1, "mean": 2}


_STATISTICS = {"sum", "sumsq", "count"}


def supports(token: Token, state: State, call: Call) -> bool:
    """Attention's sums, squares and counts, heads alike, keys and values apart, and no field of a state but those that
    all have. Records that nobody named here go to the reference.
    """
    rule = call.rule
    known = rule.only(Statistics, Observation, Pool, Ranking, Protected, Scope, Budget, Layer, Scoring, Timing)
    plain = known and set(rule[Statistics].stats) <= _STATISTICS and state.fields == FIELDS
    return plain and not call.latent and token.q.shape[3] <= WIDEST


def decode_attend_triton(token: Token, state: State, call: Call) -> Tensor:
    """See `kvpass.kernels.decode_attend.decode_attend`. The state tensors are contiguous."""
    q = rows_last(token.q)
    check_head_dims(q.shape[3], state.v.shape[3])
    plan, mask = call.rule.of_steps, call.mask
    hidden = mask_arguments(mask)
    hidden.pop("s_mq")
    heads = 1 if mask is None else mask.shape[1]
    shared: dict[str, Any] = {
        **hidden,
        "mask_heads": heads,
        "HEADS": power_of_two(heads),
        "p_stats": state.stats,
        "p_cursor": state.cursor,
        "position": call.position,
        "C": state.slots,
        "HKV": state.k.shape[1],
    }
    out = _attend(Token(q, rows_last(token.k), rows_last(token.v)), state, call.softmax, plan, shared)
    _evict(state, plan, shared)
    return out


def _attend(token: Token, state: State, softmax: Softmax, plan: Rule, shared: dict[str, Any]) -> Tensor:
    """Append, attend, update the statistics; returns out [B, Hq, 1, Dv]."""
    q, k, v = token.q, state.k, state.v
    batch, kv_heads, slots, dim = k.shape
    heads, wide = q.shape[1], v.shape[3]
    group = heads // kv_heads
    observation = plan[Observation]
    observes = bool(plan[Statistics].stats) and observation.decode != "none"
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
        p_knew=token.k,
        p_vnew=token.v,
        p_k=k,
        p_v=v,
        p_pos=state.pos,
        s_qb=q.stride(0),
        s_qh=q.stride(1),
        s_kb=token.k.stride(0),
        s_kh=token.k.stride(1),
        s_vb=token.v.stride(0),
        s_vh=token.v.stride(1),
        scale=softmax.scale,
        D=dim,
        BD=power_of_two(dim, 16),
        N=len(plan[Statistics].stats),
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
        ADD=observation.decode == "add",
        MEAN=observation.group == "mean",
        SUM=stat(plan, "sum") if observes else -1,
        SUMSQ=stat(plan, "sumsq") if observes else -1,
        COUNT=stat(plan, "count") if observes else -1,
    )
    return out


def _evict(state: State, plan: Rule, shared: dict[str, Any]) -> None:
    """Advance the cursor and free the victim's slot."""
    pos = state.pos
    (batch, kv_heads, slots), scope = pos.shape, plan[Scope]
    scoped = scope.scope_num > 0 and plan.evicts
    deviation = torch.empty(pos.shape, dtype=torch.float32, device=pos.device) if scoped else None
    block = min(power_of_two(slots, 128), 2048)
    budget: dict[str, Any] = {**vars(plan[Budget]), **vars(plan[Protected])}
    budget |= {
        "p_pos": pos,
        "p_deviation": deviation,
        "SUM": stat(plan, "sum"),
        "COUNT": stat(plan, "count"),
        "BLOCK": block,
    }
    if scoped:
        plain = {name: shared[name] for name in ("p_stats", "p_cursor", "position", "C", "HKV")}
        launch(
            deviation_kernel,
            (batch * kv_heads, blocks(slots, block)),
            pos.device,
            **plain,
            **budget,
            SUMSQ=stat(plan, "sumsq"),
            num_warps=4,
            enable_fp_fusion=False,
        )
    launch(
        victim_kernel,
        (batch * kv_heads,),
        pos.device,
        **shared,
        **budget,
        scope_num=scope.scope_num,
        scope_den=scope.scope_den,
        SCORE=_SCORES[plan[Ranking].score],
        ALL=plan[Ranking].together,
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
