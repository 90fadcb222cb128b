"""Device code of decode_attend, what follows attention: sum the splits, update the statistics, pick the slot that goes
if over budget, advance the cursor. One launch; scores that are means over heads need a second one, `victim_kernel`.
"""

# mypy: ignore-errors

import triton
import triton.language as tl
from kvpass.kernels.attention.observation import EVEN
from kvpass.kernels.triton_shared.triton_common import LOG2E, finite, rows

from .triton_row import candidates, ends, now, partials, sight, slot_zero, step_of
from .triton_victim import lowest_of, prefer, reach, search

LOOSE = ["position", "C", "splits", "s_mb", "s_mh", "s_mt", "s_nb", "slots", "num", "den", "floor", "layer"]


SHARE = tl.constexpr(EVEN)


@triton.jit
def observe(p_row, plane, b_x, m_x, INDEX: tl.constexpr, ADD: tl.constexpr):
    """Add b_x to statistic INDEX of the slots at p_row, or replace it. -1: not kept."""
    if INDEX >= 0:
        p_x = p_row + INDEX * plane
        if ADD:
            b_x += tl.load(p_x, mask=m_x, other=0.0)
        tl.store(p_x, b_x, mask=m_x)


@triton.jit
def log_sums(p_max, p_sum, p_sinks, i_r, i_h, splits, G: tl.constexpr, GS: tl.constexpr, BS: tl.constexpr,
             SINKS: tl.constexpr):  # fmt: skip
    """log2 of the sum of 2^logit of each query head of the group, float32 [GS]; +inf for heads that see nothing."""
    o_g, o_s = tl.arange(0, GS), tl.arange(0, BS)
    o_part = (i_r * G + o_g)[:, None] * splits + o_s[None, :]
    m_part = (o_g < G)[:, None] & (o_s < splits)[None, :]
    b_m = tl.load(p_max + o_part, mask=m_part, other=float("-inf"))  # [GS, BS]
    b_l = tl.load(p_sum + o_part, mask=m_part, other=0.0)
    b_max = tl.max(b_m, 1)
    if SINKS:  # here and not in the splits: once per head
        b_sink = tl.load(p_sinks + i_h * G + o_g, mask=o_g < G, other=float("-inf")).to(tl.float32) * LOG2E
        b_max = tl.maximum(b_max, b_sink)
    b_max = finite(b_max)
    b_sum = tl.sum(b_l * tl.exp2(b_m - b_max[:, None]), 1)
    if SINKS:
        b_sum += tl.exp2(b_sink - b_max)
    return tl.where(b_sum == 0.0, float("inf"), b_max + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum)))


@triton.jit
def combine(p_acc, p_max, p_sum, p_out, b_lse, i_r, splits, G: tl.constexpr, GS: tl.constexpr, DV: tl.constexpr,
            BDV: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """out [B, Hq, 1, Dv] of this program's share of the group. BC: splits summed at once."""
    o_g, o_v = tl.arange(0, GS), tl.arange(0, BDV)
    for g in range(tl.program_id(1), G, tl.num_programs(1)):
        lse = tl.min(tl.where(o_g == g, b_lse, float("inf")), 0)
        b_o = tl.zeros([BDV], tl.float32)
        for s in range(0, splits, BC):
            o_c = (i_r * G + g) * splits + s + tl.arange(0, BC)
            m_c = s + tl.arange(0, BC) < splits
            b_w = tl.exp2(tl.load(p_max + o_c, mask=m_c, other=float("-inf")) - lse)  # [BC]
            m_c = m_c & (tl.load(p_sum + o_c, mask=m_c, other=0.0) > 0.0)
            b_x = tl.load(p_acc + o_c[:, None] * DV + o_v[None, :], mask=m_c[:, None] & (o_v < DV)[None, :], other=0.0)
            b_o += tl.sum(b_w[:, None] * b_x, 0)
        tl.store(p_out + (i_r * G + g) * DV + o_v, b_o.to(p_out.dtype.element_ty), mask=o_v < DV)


@triton.jit
def update(
    p_logits, p_slot, p_seen, b_lse, plane, zero, used, seen, splits,
    G: tl.constexpr, GS: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr, ADD: tl.constexpr, MEAN: tl.constexpr,
    SUM: tl.constexpr, SUMSQ: tl.constexpr, COUNT: tl.constexpr, IMPORTANT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Statistics of this program's share of the slots: a = mean or max over the group of 2^(logit - lse)."""
    o_g = tl.arange(0, GS)
    even = 1.0
    if (IMPORTANT >= 0) | (LAST >= 0):
        b_n = tl.load(p_seen + tl.arange(0, BS), mask=tl.arange(0, BS) < splits, other=0)
        even = tl.div_rn(SHARE, tl.maximum(tl.sum(b_n, 0), 1).to(tl.float32))
    for i in range(tl.program_id(1) * BE, used, tl.num_programs(1) * BE):
        o_n = i + tl.arange(0, BE)
        m_n = o_n < used
        p_l = p_logits + o_g.to(tl.int64)[:, None] * plane + zero + o_n[None, :]
        b_s = tl.load(p_l, mask=(o_g < G)[:, None] & m_n[None, :], other=float("-inf"))  # [GS, BE]
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_a = tl.sum(b_p, 0) * (1.0 / G) if MEAN else tl.max(b_p, 0)  # [BE]
        b_c = (tl.max(b_s, 0) > float("-inf")).to(tl.float32)
        p_row = p_slot + o_n
        observe(p_row, plane, b_a, m_n, SUM, ADD)
        observe(p_row, plane, b_a * b_a, m_n, SUMSQ, ADD)
        observe(p_row, plane, b_c, m_n, COUNT, ADD)
        observe(p_row, plane, (b_a >= even).to(tl.float32), m_n, IMPORTANT, ADD)
        if LAST >= 0:
            b_x = tl.zeros([BE], tl.float32)
            if ADD:
                b_x = tl.load(p_row + LAST * plane, mask=m_n, other=0.0)
            tl.store(p_row + LAST * plane, tl.where(b_a >= even, seen.to(tl.float32), b_x), mask=m_n)


@triton.jit
def last_one(p_counter, LONE: tl.constexpr):
    """Whether all other programs of the row are done. What they wrote is seen from here on."""
    tl.debug_barrier()  # every warp has read the old cursor, and written what it found
    if LONE:
        return tl.program_id(1) == 0
    return tl.atomic_add(p_counter, 1, sem="acq_rel") == tl.num_programs(1) - 1


@triton.jit
def end_step(
    p_pos, p_stats, p_cursor, p_scratch, p_whole, i_r, zero, position, C, HKV, splits, slots, num, den, floor, layer,
    G: tl.constexpr, DV: tl.constexpr, BP: tl.constexpr, BE: tl.constexpr, COLUMNS: tl.constexpr,
    LOGITS: tl.constexpr, LONE: tl.constexpr, EVICTS: tl.constexpr, ALL: tl.constexpr, CUT: tl.constexpr,
    SINKS_KEPT: tl.constexpr, RECENT: tl.constexpr, RECENT_NUM: tl.constexpr, RECENT_DEN: tl.constexpr,
    HALVED: tl.constexpr, OBSERVED: tl.constexpr, BETA: tl.constexpr, LAYERS: tl.constexpr, TOP: tl.constexpr,
    TOP_NUM: tl.constexpr, TOP_DEN: tl.constexpr, SCORE: tl.constexpr, BY: tl.constexpr, SUM: tl.constexpr,
    SUMSQ: tl.constexpr, COUNT: tl.constexpr, NUMBER: tl.constexpr, MARK: tl.constexpr, WEIGHT: tl.constexpr,
    WEIGHT_FLOOR: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Search this program's share of the slots; the last program of the row frees the victim's (pos -1) and moves the
    cursor on. Of the slots it reads statistics and pos only. CUT: below it a slot goes though the budget is not passed.
    """
    plane = tl.num_programs(0).to(tl.int64) * C
    p_best, p_preference, p_age, p_free = candidates(p_whole, p_scratch, C, splits, G, DV, LOGITS)
    programs, i_e = tl.num_programs(1), tl.program_id(1)
    p_counter = p_whole + i_r
    p_preference += zero
    p_slot = p_stats + zero
    p_pos += zero
    p_cursor += i_r * COLUMNS
    used, seen, first, size, recent, old, young, parted = step_of(
        p_cursor, position, slots, num, den, floor, layer,
        COLUMNS, SINKS_KEPT, RECENT, RECENT_NUM, RECENT_DEN, HALVED, NUMBER >= 0, OBSERVED, BETA, LAYERS,
    )  # fmt: skip
    looks = (used > size) | (float("-inf") < CUT)
    sure, tied = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    limit = tl.full((), -1, tl.int64)
    i_h = (i_r % HKV).to(tl.int32)
    if EVICTS:  # noqa: SIM102 (decided when compiling)
        if looks:
            if TOP:
                prefer(
                    p_slot, p_pos, p_preference, plane, i_e * BE, used, programs * BE, seen, old, young,
                    BE, TOP, SCORE, BY, SUM, SUMSQ, COUNT, NUMBER, MARK, DECAY,
                )  # fmt: skip
            else:
                best, age, slot = search(
                    p_slot, p_pos, p_preference, plane, i_e * BE, tl.where(parted, 0, used), programs * BE, seen, old,
                    young, sure, tied, limit, C, i_h, HKV,
                    BE, TOP, ALL, SCORE, BY, COUNT, NUMBER, MARK, WEIGHT, WEIGHT_FLOOR, DECAY,
                )  # fmt: skip
                o_own = i_r * programs + i_e
                tl.store(p_best + o_own, best)
                tl.store(p_age + o_own, age)
                tl.store(p_free + o_own, slot)
    if last_one(p_counter, LONE):
        live, free = used, used
        if EVICTS:  # noqa: SIM102 (decided when compiling)
            if looks:
                if parted:
                    old, young = ends(p_pos, used, recent, position, SINKS_KEPT, BE)
                    if TOP:
                        prefer(
                            p_slot, p_pos, p_preference, plane, 0, used, BE, seen, old, young,
                            BE, TOP, SCORE, BY, SUM, SUMSQ, COUNT, NUMBER, MARK, DECAY,
                        )  # fmt: skip
                        tl.debug_barrier()
                if TOP:
                    sure, tied, limit = reach(p_preference, p_pos, used, size, TOP, TOP_NUM, TOP_DEN, BE)
                o_p = tl.arange(0, BP)
                m_p = o_p < programs
                o_all = i_r * programs + o_p
                b_best = tl.load(p_best + o_all, mask=m_p, other=float("inf"), cache_modifier=".cg")
                b_age = tl.load(p_age + o_all, mask=m_p, other=-1, cache_modifier=".cg")
                b_slot = tl.load(p_free + o_all, mask=m_p, other=0, cache_modifier=".cg")
                score, age, slot = lowest_of(b_best, b_age, b_slot)
                if parted | (TOP > 0):  # this program searches alone
                    score, age, slot = search(
                        p_slot, p_pos, p_preference, plane, 0, used, BE, seen, old, young, sure, tied, limit, C, i_h,
                        HKV, BE, TOP, ALL, SCORE, BY, COUNT, NUMBER, MARK, WEIGHT, WEIGHT_FLOOR, DECAY,
                    )  # fmt: skip
                if (used > size) | (score < CUT):
                    tl.store(p_pos + slot, -1)
                    live, free = used - 1, slot
        tl.store(p_cursor, live)
        tl.store(p_cursor + 1, free)
        tl.store(p_cursor + 2, seen)
        tl.store(p_cursor + 3, first)


@triton.jit(do_not_specialize=LOOSE)
def ending_kernel(
    p_mask, p_bounds, p_at, p_pos, p_stats, p_cursor, p_scratch, p_whole, p_sinks, p_out,
    s_mb, s_mh, s_mt, s_nb, mask_heads, position, C, HKV, splits, slots, num, den, floor, layer,
    G: tl.constexpr, GS: tl.constexpr, HEADS: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, BS: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, BE: tl.constexpr, COLUMNS: tl.constexpr, LOGITS: tl.constexpr,
    AT: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr, MASK: tl.constexpr,
    HIDDEN: tl.constexpr, SINKS: tl.constexpr, ADD: tl.constexpr, MEAN: tl.constexpr, SUM: tl.constexpr,
    SUMSQ: tl.constexpr, COUNT: tl.constexpr, IMPORTANT: tl.constexpr, LAST: tl.constexpr, ENDS: tl.constexpr,
    LONE: tl.constexpr, EVICTS: tl.constexpr, CUT: tl.constexpr, SINKS_KEPT: tl.constexpr, RECENT: tl.constexpr,
    RECENT_NUM: tl.constexpr, RECENT_DEN: tl.constexpr, HALVED: tl.constexpr, OBSERVED: tl.constexpr,
    BETA: tl.constexpr, LAYERS: tl.constexpr, TOP: tl.constexpr, TOP_NUM: tl.constexpr, TOP_DEN: tl.constexpr,
    SCORE: tl.constexpr, BY: tl.constexpr, NUMBER: tl.constexpr, MARK: tl.constexpr, WEIGHT: tl.constexpr,
    WEIGHT_FLOOR: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """out [B, Hq, 1, Dv] from the splits; statistics of the slots from the logits; if it ENDS the step, `end_step`.

    Program: (b, KV head) x share of the query heads and of the slots, in blocks of BE. BS >= splits, GS >= G, BP >=
    programs of a row: powers of two. Indices of statistics are -1 where they are not kept, or not observed.
    """
    i_r, position = rows(0), now(p_at, position, AT)
    zero = slot_zero(p_cursor, i_r, C, COLUMNS)
    p_acc, p_max, p_sum, p_logits = partials(p_scratch, C, splits, G, DV)
    i_h = (i_r % HKV).to(tl.int32)
    b_lse = log_sums(p_max, p_sum, p_sinks, i_r, i_h, splits, G, GS, BS, SINKS)  # [GS]
    combine(p_acc, p_max, p_sum, p_out, b_lse, i_r, splits, G, GS, DV, BDV, BC)
    arrived, _, _, _ = sight(
        p_mask, p_bounds, p_cursor + i_r * COLUMNS + 3, i_r // HKV, position, mask_heads, s_mb, s_mh, s_mt, s_nb,
        WINDOW, CHUNK, TOKENS, HEADS, MASK, HIDDEN,
    )  # fmt: skip
    if arrived > 0:
        if LOGITS:
            plane = tl.num_programs(0).to(tl.int64) * C
            p_row = p_cursor + i_r * COLUMNS
            p_seen = p_whole + tl.num_programs(0) + i_r * splits
            update(
                p_logits, p_stats + zero, p_seen, b_lse, plane, zero, tl.load(p_row) + 1, tl.load(p_row + 2) + 1,
                splits, G, GS, BS, BE, ADD, MEAN, SUM, SUMSQ, COUNT, IMPORTANT, LAST,
            )  # fmt: skip
            tl.debug_barrier()  # the search reads them back
        if ENDS:
            end_step(
                p_pos, p_stats, p_cursor, p_scratch, p_whole, i_r, zero, position, C, HKV, splits, slots, num, den,
                floor, layer, G, DV, BP, BE, COLUMNS, LOGITS, LONE, EVICTS, False, CUT, SINKS_KEPT, RECENT,
                RECENT_NUM, RECENT_DEN, HALVED, OBSERVED, BETA, LAYERS, TOP, TOP_NUM, TOP_DEN, SCORE, BY, SUM, SUMSQ,
                COUNT, NUMBER, MARK, WEIGHT, WEIGHT_FLOOR, DECAY,
            )  # fmt: skip


@triton.jit(do_not_specialize=LOOSE)
def victim_kernel(
    p_mask, p_bounds, p_at, p_pos, p_stats, p_cursor, p_scratch, p_whole,
    s_mb, s_mh, s_mt, s_nb, mask_heads, position, C, HKV, splits, slots, num, den, floor, layer,
    G: tl.constexpr, HEADS: tl.constexpr, DV: tl.constexpr, BP: tl.constexpr, BE: tl.constexpr, COLUMNS: tl.constexpr,
    LOGITS: tl.constexpr, AT: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr,
    MASK: tl.constexpr, HIDDEN: tl.constexpr, CUT: tl.constexpr, SINKS_KEPT: tl.constexpr, RECENT: tl.constexpr,
    RECENT_NUM: tl.constexpr, RECENT_DEN: tl.constexpr, HALVED: tl.constexpr, OBSERVED: tl.constexpr,
    BETA: tl.constexpr, LAYERS: tl.constexpr, TOP: tl.constexpr, TOP_NUM: tl.constexpr, TOP_DEN: tl.constexpr,
    SCORE: tl.constexpr, BY: tl.constexpr, SUM: tl.constexpr, SUMSQ: tl.constexpr, COUNT: tl.constexpr,
    NUMBER: tl.constexpr, MARK: tl.constexpr, WEIGHT: tl.constexpr, WEIGHT_FLOOR: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """`end_step` with scores that are means over heads, when the statistics of all heads are written. Same grid."""
    i_r, position = rows(0), now(p_at, position, AT)
    zero = slot_zero(p_cursor, i_r, C, COLUMNS)
    arrived, _, _, _ = sight(
        p_mask, p_bounds, p_cursor + i_r * COLUMNS + 3, i_r // HKV, position, mask_heads, s_mb, s_mh, s_mt, s_nb,
        WINDOW, CHUNK, TOKENS, HEADS, MASK, HIDDEN,
    )  # fmt: skip
    if arrived > 0:
        end_step(
            p_pos, p_stats, p_cursor, p_scratch, p_whole, i_r, zero, position, C, HKV, splits, slots, num, den, floor,
            layer, G, DV, BP, BE, COLUMNS, LOGITS, False, True, True, CUT, SINKS_KEPT, RECENT, RECENT_NUM, RECENT_DEN,
            HALVED, OBSERVED, BETA, LAYERS, TOP, TOP_NUM, TOP_DEN, SCORE, BY, SUM, SUMSQ, COUNT, NUMBER, MARK, WEIGHT,
            WEIGHT_FLOOR, DECAY,
        )  # fmt: skip
