"""decode_attend in Triton. Tested in the interpreter and compiled ahead of time; earlier forms of it ran on an H200
(docs/gpu.md).

Two launches: partial attention over splits of the slots (reads K and V once per KV head); then their sum, the
statistics, and the victim, which the last program of a row picks. Scores that are means over heads take a third. Slots
that hold codes are read as such (`triton_codes`); torch makes the token's (`triton_stored`), and a launch before the
others finds which slots have whole copies. Grids and scratch depend on shapes alone and nothing is read back, so a CUDA
graph can hold them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from kvpass.kernels.choose import WIDEST
from kvpass.kernels.codecs.entries import turned
from kvpass.kernels.codecs.storage import WHOLE_AT, coded
from kvpass.kernels.decode_attend.call import Call, Token
from kvpass.kernels.rank.criterion import Ranking
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.ragged import Ragged
from kvpass.kernels.slots.state import FIELDS, State
from kvpass.kernels.slots.statistics import Statistics
from kvpass.kernels.triton_shared.triton_launch import (
    Target,
    blocks,
    check_head_dims,
    mask_arguments,
    power_of_two,
    precision,
    rows_last,
    target,
)
from kvpass.kernels.triton_shared.triton_prepared import Prepared
from torch import Tensor

from .triton_codes import places_kernel
from .triton_ending import ending_kernel, victim_kernel
from .triton_kernel import split_kernel
from .triton_stored import NO_CODES, enter, fits, stored, turns
from .triton_terms import constants, counted, numbers, observed, observes, understood


def supports(token: Token, state: State, call: Call) -> bool:
    """All rules but those with rings (`understood`); keys and values apart, heads of up to 256, no memory keys."""
    apart, rule = not call.latent and call.softmax.beside is None, call.rule
    narrow = token.q.shape[3] <= WIDEST and (not coded(rule) or fits(rule, token.k.shape[3], token.v.shape[3]))
    return understood(rule) and apart and narrow


def decode_attend_triton(token: Token, state: State, call: Call) -> Tensor:
    """See `kvpass.kernels.decode_attend.decode_attend`. The state tensors are contiguous."""
    if call.softmax.beside is not None:
        raise ValueError('decode_attend: the triton kernel knows no memory keys; use("reference")')
    rule, dtype, codes = call.rule, token.q.dtype, NO_CODES
    keys, values, *held = state.tensors()[: len(FIELDS)]
    if coded(rule):
        token, keys, values, codes = enter(token, state, call)
    q, k, v, arrive = token
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        q, k, v = (rows_last(x) for x in (q, k, v))
    mask, bounds, at, softmax, tokens = call.mask, call.bounds, call.at, call.softmax, call.tokens
    if tokens is not None:
        tokens = rows_last(tokens).view(torch.uint8)
    hidden, step = mask_arguments(mask), _prepared(Token(q, k, v, arrive), state, call)
    scratch = torch.empty(step.floats, dtype=torch.float32, device=q.device)
    whole = torch.empty(step.integers, dtype=torch.int32, device=q.device)
    out = q.new_empty(step.out, dtype=torch.float32 if turns(rule, "v") else dtype)
    place = None
    if step.places:
        place = torch.empty_like(state.pos)
        step.places.launch((state.pos, state[WHOLE_AT], state.cursor, place), (state.slots,))
    shared = hidden["p_mask"], bounds, at, *held, scratch, whole
    s_nb = 0 if bounds is None or bounds.shape[0] == 1 else bounds.stride(0)
    s_tb = 0 if tokens is None or tokens.shape[0] == 1 else tokens.stride(0)
    numbers = hidden["s_mb"], hidden["s_mh"], hidden["s_mt"], s_nb, 0 if at is not None else call.position
    arrive = arrive if arrive is None else arrive.contiguous()
    step.split.launch((*shared, q, k, v, keys, values, arrive, tokens, place, *codes), (*numbers, s_tb))
    step.ending.launch((*shared, softmax.sinks if softmax.sinks is None else softmax.sinks.contiguous(), out), numbers)
    if step.victim:
        step.victim.launch(shared, numbers)
    return turned(out, "v", rule).to(dtype) if turns(rule, "v") else out


SHARED = "p_mask", "p_bounds", "p_at", "p_pos", "p_stats", "p_cursor", "p_scratch", "p_whole"
NUMBERS = "s_mb", "s_mh", "s_mt", "s_nb", "position"
"""What a launch of each kernel gives, in order; then each its own."""
CODES = "p_kcodes", "p_kscale", "p_klow", "p_vcodes", "p_vscale", "p_vlow"
TOKEN = "p_q", "p_knew", "p_vnew", "p_k", "p_v", "p_arrive", "p_tokens"
SPLIT = (*SHARED, *TOKEN, "p_place", *CODES), (*NUMBERS, "s_tb")
ENDING = (*SHARED, "p_sinks", "p_out"), NUMBERS


class _Step(NamedTuple):
    """The launches of a step, and sizes of what is allocated for it: they follow from shapes alone."""

    split: Prepared
    ending: Prepared
    victim: Prepared | None
    places: Prepared | None
    floats: int
    integers: int
    out: tuple[int, ...]


def _prepared(token: Token, state: State, call: Call) -> _Step:
    """Made once for each rule, shapes and words."""
    q, rule, softmax, mask, at = token.q, call.rule, call.softmax, call.mask, call.at
    known = rule.derived.setdefault(_prepared, {})
    key = (
        *(q.shape, q.stride(), token.k.stride(), token.v.stride(), state.pos.shape, state.v.shape[3]),
        *(q.dtype, q.device, target(q.device), token.arrive is None, call.tokens is None, call.sees),
        *(softmax.scale, softmax.softcap),
        None if softmax.sinks is None else softmax.sinks.dtype,
        None if mask is None else (mask.dtype, mask.shape[1]),
        None if at is None else at.dtype,
    )
    found: _Step | None = known.get(key)
    if found is None:
        check_head_dims(q.shape[3], state.v.shape[3])
        if len(known) >= 256:  # lengths that grow leave old ones behind
            known.clear()
        found = known[key] = _prepare(token, state, call)
    return found


def _prepare(token: Token, state: State, call: Call) -> _Step:
    q, k, v, _ = token
    plan, device, on, (batch, kv_heads, slots) = call.rule.of_steps, q.device, target(q.device), state.pos.shape
    heads, dim, wide, rows = q.shape[1], q.shape[3], state.v.shape[3], batch * kv_heads
    held, whole = stored(plan, dim, wide), power_of_two(heads // kv_heads)
    group, looks, together = heads // kv_heads, observes(plan), plan.evicts and plan[Ranking].together
    config, fixed = _config(max(held["BD"], held["BDV"]), q.element_size(), on, bool(coded(plan))), constants(plan)
    # heads of one length need one wave of programs; of unequal ones, a few, so that none is long
    waves = 4 if plan[Ragged].ragged else 1
    block, splits = _block(plan, whole, on), _splits(rows, slots, config["BN"], on, waves)
    programs = max(blocks(slots, block) if looks or plan.evicts else 1, group)
    wide2, splits2 = power_of_two(wide, 16), power_of_two(splits)
    shared: dict[str, Any] = _seen(call) | {
        "C": slots, "HKV": kv_heads, "splits": splits, "G": group, "DV": wide, "LOGITS": looks,
        "COLUMNS": fixed["COLUMNS"],
    }  # fmt: skip
    split = {
        **shared, **config, **held, "D": dim, "N": len(plan[Statistics].stats),
        "GP": 1 if group == 1 else power_of_two(group, 16), "COUNTED": counted(plan), "PRECISION": precision(on),
        "s_qb": q.stride(0), "s_qh": q.stride(1), "s_kb": k.stride(0), "s_kh": k.stride(1), "s_vb": v.stride(0),
        "s_vh": v.stride(1), "scale": call.softmax.scale, "SOFTCAP": float(call.softmax.softcap),
        "ARRIVE": token.arrive is not None,
    }  # fmt: skip
    # preferences that torch finds equal must be equal here: no fused multiply-add
    after = {**shared, **fixed, **numbers(plan), "num_warps": 4, "enable_fp_fusion": fixed["TOP"] == 0}
    after |= {"BE": block, "BP": power_of_two(programs)}
    ending = {
        **after, **observed(plan), "GS": whole, "BDV": wide2, "BS": splits2, "BC": max(1, min(splits2, 4096 // wide2)),
        "SINKS": call.softmax.sinks is not None, "ENDS": not together, "LONE": not (looks or plan.evicts),
        "EVICTS": plan.evicts,
    }  # fmt: skip
    return _Step(
        Prepared(split_kernel, (rows, splits), device, *SPLIT, **split),
        Prepared(ending_kernel, (rows, programs), device, *ENDING, **ending),
        Prepared(victim_kernel, (rows, programs), device, SHARED, NUMBERS, **after) if together else None,
        _places(held["COPIES"], rows, slots, fixed["COLUMNS"], device),
        floats=rows * (group * splits * (wide + 2) + programs + slots * (group * looks + (fixed["TOP"] > 0))),
        integers=rows * (1 + splits + 2 * programs),
        out=(batch, heads, 1, wide),
    )


def _places(copies: int, rows: int, slots: int, columns: int, device: torch.device) -> Prepared | None:
    """The launch that finds whole copies; None without any."""
    sizes = {"COLUMNS": columns, "COPIES": copies, "BE": 256, "BW": 16}
    grid, tensors = (rows, blocks(slots, 256)), ("p_pos", "p_at", "p_cursor", "p_place")
    return Prepared(places_kernel, grid, device, tensors, ("C",), **sizes, num_warps=4) if copies else None


def _seen(call: Call) -> dict[str, Any]:
    """Constants of what the call says of what its token sees."""
    hidden, heads = mask_arguments(call.mask), 1 if call.mask is None else call.mask.shape[1]
    return {
        **{name: hidden[name] for name in ("MASK", "HIDDEN")},
        "mask_heads": heads,
        "HEADS": power_of_two(heads),
        "AT": call.at is not None,
        "WINDOW": call.sees.window,
        "CHUNK": call.sees.chunk,
        "TOKENS": call.tokens is not None,
    }


def _block(plan: Rule, group: int, on: Target) -> int:
    """Slots that a program of `ending_kernel` takes at once."""
    if on.kind == "interpret":
        return 16
    return max(128, min(512, 4096 // group)) if observes(plan) else 1024  # twice as many spill a little on sm_90


def _splits(rows: int, slots: int, block: int, on: Target, waves: int = 1) -> int:
    """Programs per (b, KV head), each with two blocks or more: a power of two <= 256.

    The fewest that fill the device's places (two programs on a core) so many times and keep nearly all of them busy
    until the end.
    """
    places, most = 2 * on.cores, max(1, min(slots // (2 * block), 256))
    tried = [1 << n for n in range(most.bit_length())]

    def busy(splits: int) -> float:
        return rows * splits / (blocks(rows * splits, places) * places)

    full = [n for n in tried if rows * n >= 0.85 * waves * places and busy(n) >= 0.85]
    return full[0] if full else max(tried, key=busy) if waves == 1 else tried[-1]


def _config(dim: int, bytes_each: int, on: Target, codes: bool) -> dict[str, int]:
    """Pinned block size of split_kernel by columns and element size. Codes take registers until they are numbers. Not
    tuned on hardware.
    """
    if on.kind == "interpret":
        return {"BN": 16, "num_warps": 4, "num_stages": 1}
    large = dim > (64 if codes else 128) or bytes_each > 2
    huge = dim > 128 and bytes_each > 2
    stages = 1 if on.kind == "hip" else 3 if on.roomy and not huge else 2
    return {"BN": 16 if huge else 32 if large else 64, "num_warps": 4, "num_stages": stages}
