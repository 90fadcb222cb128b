"""decode_attend in Triton. Tested in the interpreter and on an H200 (docs/gpu.md); compiled ahead of time too.

Two launches: partial attention over splits of the slots (reads K and V once per KV head); then their sum, the
statistics, and the victim, which the last program of a row picks. Scores that are means over heads take a third.
Grids and scratch depend on shapes alone and nothing is read back, so a CUDA graph can hold them.
"""

from __future__ import annotations

from typing import Any

import torch
from kvpass.kernels.choose import WIDEST
from kvpass.kernels.decode_attend.call import Call, Token
from kvpass.kernels.rank.criterion import Ranking
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.state import State
from kvpass.kernels.slots.statistics import Statistics
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

from .triton_ending import ending_kernel, victim_kernel
from .triton_kernel import split_kernel
from .triton_terms import constants, counted, numbers, observed, observes, understood


def supports(token: Token, state: State, call: Call) -> bool:
    """All rules but those with rings (`understood`); keys and values apart, heads of up to 256."""
    return understood(call.rule) and not call.latent and token.q.shape[3] <= WIDEST


def decode_attend_triton(token: Token, state: State, call: Call) -> Tensor:
    """See `kvpass.kernels.decode_attend.decode_attend`. The state tensors are contiguous."""
    q, k, v = (rows_last(x) for x in (token.q, token.k, token.v))
    check_head_dims(q.shape[3], state.v.shape[3])
    plan, device, (batch, kv_heads, slots, dim) = call.rule.of_steps, q.device, state.k.shape
    heads, wide, rows = q.shape[1], state.v.shape[3], batch * kv_heads
    sizes = _sizes(plan, (heads // kv_heads, rows, slots, dim, wide, q.element_size()), target(device))
    splits, programs, group = sizes.splits, sizes.programs, heads // kv_heads
    out = q.new_empty(batch, heads, 1, wide)
    given = _given(call) | {
        "p_pos": state.pos,
        "p_stats": state.stats,
        "p_cursor": state.cursor,
        "p_scratch": torch.empty(sizes.floats, dtype=torch.float32, device=device),
        "p_whole": torch.empty(rows * (1 + splits + 2 * programs), dtype=torch.int32, device=device),
        "C": slots,
        "HKV": kv_heads,
        "splits": splits,
    }
    arrive, sinks = token.arrive, call.softmax.sinks
    launch(
        split_kernel,
        (rows, splits),
        device,
        **given,
        **sizes.split,
        p_q=q,
        p_knew=k,
        p_vnew=v,
        p_arrive=None if arrive is None else arrive.contiguous(),
        p_k=state.k,
        p_v=state.v,
        s_qb=q.stride(0),
        s_qh=q.stride(1),
        s_kb=k.stride(0),
        s_kh=k.stride(1),
        s_vb=v.stride(0),
        s_vh=v.stride(1),
        s_tb=0 if call.tokens is None or len(call.tokens) == 1 else call.tokens.stride(0),
        p_tokens=None if call.tokens is None else rows_last(call.tokens).view(torch.uint8),
        scale=call.softmax.scale,
        ARRIVE=arrive is not None,
        SOFTCAP=float(call.softmax.softcap),
    )
    launch(
        ending_kernel,
        (rows, programs),
        device,
        **given,
        **sizes.ending,
        p_sinks=None if sinks is None else sinks.contiguous(),
        p_out=out,
        SINKS=sinks is not None,
    )
    if sizes.victim:
        launch(victim_kernel, (rows, programs), device, **given, **sizes.victim)
    return out


def _given(call: Call) -> dict[str, Any]:
    """What the call says: where its token is, and what that sees."""
    mask, bounds, at = call.mask, call.bounds, call.at
    hidden = mask_arguments(mask)
    hidden.pop("s_mq")
    heads = 1 if mask is None else mask.shape[1]
    return {
        **hidden,
        "mask_heads": heads,
        "HEADS": power_of_two(heads),
        "p_bounds": bounds,
        "s_nb": 0 if bounds is None or len(bounds) == 1 else bounds.stride(0),
        "p_at": at,
        "position": 0 if at is not None else call.position,
        "AT": at is not None,
        "WINDOW": call.sees.window,
        "CHUNK": call.sees.chunk,
        "TOKENS": call.tokens is not None,
    }


class _Sizes:
    """Grids, scratch and constants of a step under a rule: they follow from shapes alone.

    Attributes:
        splits, programs: programs of a row of slots that attend; that end the step.
        floats: of scratch.
        split, ending, victim: arguments of the kernels; `victim` only if it is launched.
    """

    def __init__(self, plan: Rule, shape: tuple[int, ...], on: Target) -> None:
        group, rows, slots, dim, wide, each = shape
        looks, together = observes(plan), plan.evicts and plan[Ranking].together
        config, whole = _config(max(dim, wide), each, on), power_of_two(group)
        block = _block(plan, whole, on)
        self.splits = _splits(rows, slots, config["BN"], on)
        self.programs = max(blocks(slots, block) if looks or plan.evicts else 1, group)
        self.floats = rows * (group * self.splits * (wide + 2) + self.programs + slots * (group * looks + (constants(plan)["TOP"] > 0)))
        shared = {"G": group, "DV": wide, "LOGITS": looks}
        wide2, split2 = power_of_two(wide, 16), power_of_two(self.splits)
        self.split = {
            **shared,
            **config,
            "GP": 1 if group == 1 else power_of_two(group, 16),
            "D": dim,
            "BD": power_of_two(dim, 16),
            "BDV": wide2,
            "N": len(plan[Statistics].stats),
            "COLUMNS": constants(plan)["COLUMNS"],
            "COUNTED": counted(plan),
            "PRECISION": precision(on),
        }
        fixed, number = constants(plan), numbers(plan)
        # preferences that torch finds equal must be equal here
        after = {**shared, **fixed, **number, "BE": block, "num_warps": 4, "enable_fp_fusion": fixed["TOP"] == 0}
        after["BP"] = power_of_two(self.programs)
        self.ending = {
            **after,
            **observed(plan),
            "GS": whole,
            "BDV": wide2,
            "BS": split2,
            "BC": max(1, min(split2, 4096 // wide2)),
            "ENDS": not together,
            "LONE": not (looks or plan.evicts),
            "EVICTS": plan.evicts,
        }
        self.victim = after if together else None


def _sizes(plan: Rule, shape: tuple[int, ...], on: Target) -> _Sizes:
    """Found once for each rule, shape and device."""
    known = plan.derived.setdefault(_sizes, {})
    found: _Sizes | None = known.get((shape, on))
    if found is None:
        found = known[shape, on] = _Sizes(plan, shape, on)
    return found


def _block(plan: Rule, group: int, on: Target) -> int:
    """Slots that a program of `ending_kernel` takes at once."""
    if on.kind == "interpret":
        return 16
    return max(128, min(1024, 4096 // group)) if observes(plan) else 1024


def _splits(rows: int, slots: int, block: int, on: Target) -> int:
    """Programs per (b, KV head), each with two blocks or more: a power of two <= 256.

    The fewest that keep nearly all of the device's places (two programs on a core) busy until the end.
    """
    places, most = 2 * on.cores, max(1, min(slots // (2 * block), 256))
    tried = [1 << n for n in range(most.bit_length())]

    def busy(splits: int) -> float:
        return rows * splits / (blocks(rows * splits, places) * places)

    return next((n for n in tried if busy(n) >= 0.85), max(tried, key=busy))


def _config(dim: int, bytes_each: int, on: Target) -> dict[str, int]:
    """Pinned block size of split_kernel by head dim and element size. Not tuned on hardware."""
    if on.kind == "interpret":
        return {"BN": 16, "num_warps": 4, "num_stages": 1}
    large = dim > 128 or bytes_each > 2
    huge = dim > 128 and bytes_each > 2
    stages = 1 if on.kind == "hip" else 3 if on.roomy and not huge else 2
    return {"BN": 16 if huge else 32 if large else 64, "num_warps": 4, "num_stages": stages}
