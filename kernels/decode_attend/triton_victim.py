"""Device code of decode_attend, what follows attention: count the token, pick the slot that goes if over budget."""

# mypy: ignore-errors

import triton
import triton.language as tl
from kvpass.kernels.triton_shared.triton_common import arrives, count_from, kth_key, rising, rows

POSITION = tl.constexpr(0)
SUM_SCORE = tl.constexpr(1)
MEAN_SCORE = tl.constexpr(2)
UNTOUCHABLE = tl.constexpr(3.0e38)
PLAIN = ["position", "C", "s_mb", "s_mh", "s_mt", "slots", "num", "den", "floor", "sinks", "recent", "recent_num"]
PLAIN += ["recent_den", "scope_num", "scope_den"]


@triton.jit
def nth_largest(p_pos, used, n, limit, BLOCK: tl.constexpr):
    """Of the positions of `used` slots, all below `limit`; 0 for an n beyond them, `limit` for n <= 0. int64."""
    low, high = tl.full((), 0, tl.int64), tl.cast(limit, tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        b_c = tl.zeros([BLOCK], tl.int32)
        for i in range(0, used, BLOCK):
            o_c = i + tl.arange(0, BLOCK)
            b_pos = tl.load(p_pos + o_c, mask=o_c < used, other=-1)
            b_c += (b_pos >= middle).to(tl.int32)
        enough = tl.sum(b_c, 0) >= n
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def bounds(
    p_cursor, p_pos, position, slots, num, den, floor, sinks, recent, recent_num, recent_den, BLOCK: tl.constexpr
):
    """The step in numbers: slots used with the new token, tokens seen, first position, budget n, and the ends of the
    unprotected positions: old <= pos < young. p_cursor, p_pos: one head's, the cursor as before the step.

    Where padding stands between tokens, positions do not count them. The slots of the first and of the last tokens are
    all in use, so their ranks do.
    """
    used = tl.load(p_cursor) + 1
    seen = tl.load(p_cursor + 2) + 1
    first = tl.load(p_cursor + 3)
    first = tl.where(first < 0, position, first).to(tl.int32)
    size = tl.maximum(floor, seen.to(tl.int64) * num // den)
    size = tl.where(slots > 0, slots, size)
    window = recent + size * recent_num // recent_den
    old, young = first.to(tl.int64) + sinks, position + 1 - window
    if (position + 1 - first > seen) & (used > size):
        young = nth_largest(p_pos, used, window, position + 1, BLOCK)
        if sinks > 0:
            old = nth_largest(p_pos, used, used - sinks + 1, position + 1, BLOCK) + 1
    return used, seen, first, size, old, young


@triton.jit
def slot_score(p_sum, p_count, o_c, b_pos, m_c, SCORE: tl.constexpr):
    """Score of slots o_c of one head, float32: the position, the sum, or sum / max(count, 1)."""
    b_x = b_pos.to(tl.float32)
    if SCORE != POSITION:
        b_x = tl.load(p_sum + o_c, mask=m_c, other=0.0)
    if SCORE == MEAN_SCORE:
        b_x = tl.div_rn(b_x, tl.maximum(tl.load(p_count + o_c, mask=m_c, other=1.0), 1.0))
    return b_x


@triton.jit
def oldest_ties(p_deviation, p_pos, n, tied, ties, BLOCK: tl.constexpr):
    """Position of the ties-th oldest slot whose deviation has the key `tied`; -1 for no ties; all differ."""
    low, high = tl.full((), -1, tl.int64), tl.full((), 2147483647, tl.int64)
    high = tl.where(ties > 0, high, low)
    while high - low > 1:
        middle = (low + high) >> 1
        b_c = tl.zeros([BLOCK], tl.int32)
        for i in range(0, n, BLOCK):
            o_c = i + tl.arange(0, BLOCK)
            b_key = rising(tl.load(p_deviation + o_c, mask=o_c < n, other=-1.0)).to(tl.int64)
            b_pos = tl.load(p_pos + o_c, mask=o_c < n, other=-1)
            b_c += ((b_key == tied) & (b_pos <= middle) & (o_c < n)).to(tl.int32)
        enough = tl.sum(b_c, 0) >= ties
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle)
    return high


@triton.jit
def victim(
    p_sum, p_count, p_pos, p_deviation, n, stride, heads, i_h, old, young, sure, tied, limit,
    SCORE: tl.constexpr, ALL: tl.constexpr, SCOPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Slot with the lowest score of the n used ones, ties the newest. Protected: pos < old or pos >= young.

    ALL: scores are means over the `heads` heads, whose rows are `stride` apart, this one being number i_h. SCOPE:
    deviations of a key >= `sure`, and those of key `tied` up to position `limit`, are out of reach.
    """
    b_best = tl.full([BLOCK], float("inf"), tl.float32)
    b_age = tl.full([BLOCK], -1, tl.int32)
    b_slot = tl.zeros([BLOCK], tl.int32)
    for i in range(0, n, BLOCK):
        o_c = i + tl.arange(0, BLOCK)
        m_c = o_c < n
        b_pos = tl.load(p_pos + o_c, mask=m_c, other=-1)
        if ALL:
            b_x = tl.zeros([BLOCK], tl.float32)
            for h in range(heads):
                b_x += slot_score(p_sum + (h - i_h) * stride, p_count + (h - i_h) * stride, o_c, b_pos, m_c, SCORE)
            b_x = tl.div_rn(b_x, tl.zeros([BLOCK], tl.float32) + heads)
        else:
            b_x = slot_score(p_sum, p_count, o_c, b_pos, m_c, SCORE)
        if SCOPE:
            b_key = rising(tl.load(p_deviation + o_c, mask=m_c, other=-1.0)).to(tl.int64)
            b_x = tl.where((b_key >= sure) | ((b_key == tied) & (b_pos <= limit)), UNTOUCHABLE, b_x)
        b_x = tl.where((b_pos < old) | (b_pos >= young), float("inf"), b_x)
        m_lower = m_c & ((b_x < b_best) | ((b_x == b_best) & (b_pos > b_age)))
        b_best = tl.where(m_lower, b_x, b_best)
        b_age = tl.where(m_lower, b_pos, b_age)
        b_slot = tl.where(m_lower, o_c, b_slot)
    m_best = b_best == tl.min(b_best, 0)
    age = tl.max(tl.where(m_best, b_age, -1), 0)
    return tl.max(tl.where(m_best & (b_age == age), b_slot, 0), 0)


@triton.jit(do_not_specialize=PLAIN)
def deviation_kernel(
    p_pos, p_stats, p_cursor, p_deviation, position, C, HKV,
    slots, num, den, floor, sinks, recent, recent_num, recent_den,
    SUM: tl.constexpr, SUMSQ: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Standard deviation of the probabilities each slot was given -> deviation [B, Hkv, C]; -1 where protected.

    Only over budget. Program: (b, KV head) x block of slots. Rounded as torch does it: true division and root, no fused
    multiply-add (the launch turns fusion off), because two deviations that torch finds equal must be equal here.
    """
    i_r = rows(0)
    plane = tl.num_programs(0).to(tl.int64) * C
    used, _, _, size, old, young = bounds(
        p_cursor + i_r * 4, p_pos + i_r * C, position, slots, num, den, floor, sinks, recent, recent_num, recent_den,
        BLOCK,
    )  # fmt: skip
    if used > size:
        o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        m_c = o_c < used
        b_pos = tl.load(p_pos + i_r * C + o_c, mask=m_c, other=-1)
        p_row = p_stats + i_r * C + o_c
        b_count = tl.maximum(tl.load(p_row + COUNT * plane, mask=m_c, other=1.0), 1.0)
        b_mean = tl.div_rn(tl.load(p_row + SUM * plane, mask=m_c, other=0.0), b_count)
        b_var = tl.div_rn(tl.load(p_row + SUMSQ * plane, mask=m_c, other=0.0), b_count) - b_mean * b_mean
        b_std = tl.sqrt_rn(tl.maximum(b_var, 0.0))
        tl.store(p_deviation + i_r * C + o_c, tl.where((b_pos >= old) & (b_pos < young), b_std, -1.0), mask=m_c)


@triton.jit(do_not_specialize=PLAIN)
def victim_kernel(
    p_mask, p_pos, p_stats, p_cursor, p_deviation, s_mb, s_mh, s_mt, mask_heads, position, C, HKV,
    slots, num, den, floor, sinks, recent, recent_num, recent_den, scope_num, scope_den,
    HEADS: tl.constexpr, SUM: tl.constexpr, COUNT: tl.constexpr, SCORE: tl.constexpr, ALL: tl.constexpr,
    SCOPE: tl.constexpr, EVICTS: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Advance cursor [B, Hkv, 4]; over budget, free the victim (pos -1). Program: (b, KV head).

    Of the slots it reads statistics and pos only.
    """
    i_r = rows(0)
    i_b, i_h = i_r // HKV, i_r % HKV
    if arrives(p_mask, i_b, position, mask_heads, s_mb, s_mh, s_mt, HEADS, MASK, HIDDEN) > 0:
        p_cursor += i_r * 4
        p_pos += i_r * C
        used, seen, first, size, old, young = bounds(
            p_cursor, p_pos, position, slots, num, den, floor, sinks, recent, recent_num, recent_den, BLOCK
        )
        live, free = used, used
        if EVICTS:  # noqa: SIM102 (decided when compiling)
            if used > size:
                plane = tl.num_programs(0).to(tl.int64) * C
                p_row = p_stats + i_r * C
                sure, tied = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
                limit = tl.full((), -1, tl.int64)
                if SCOPE:
                    p_deviation += i_r * C
                    exposed = count_from(p_deviation, used, 0, BLOCK)
                    reach = size * scope_num // scope_den + 1 - (used - exposed)
                    reach = tl.minimum(tl.maximum(reach, 0), exposed)
                    sure, tied, ties = kth_key(p_deviation, used, reach, BLOCK)
                    limit = oldest_ties(p_deviation, p_pos, used, tied, ties, BLOCK)
                free = victim(
                    p_row + SUM * plane, p_row + COUNT * plane, p_pos, p_deviation, used, C, HKV, i_h, old, young,
                    sure, tied, limit, SCORE, ALL, SCOPE, BLOCK,
                )  # fmt: skip
                tl.store(p_pos + free, -1)
                live = used - 1
        tl.debug_barrier()  # every warp has read the old cursor: they must all take the same branches
        tl.store(p_cursor, live)
        tl.store(p_cursor + 1, free)
        tl.store(p_cursor + 2, seen)
        tl.store(p_cursor + 3, first)
