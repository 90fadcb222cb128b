"""Device helpers that two or more Triton kernels share: logits, masks, softmax in base 2, exact selection.

Every offset that can pass 2^31 is made of int64 program ids (`rows` below); offsets inside a row are int32.
The kernels are tested with Triton's interpreter and compiled ahead of time; which ran on a GPU: docs/gpu.md.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)
FLOAT_MASK = tl.constexpr(2)


@triton.jit
def rows(axis: tl.constexpr):
    """A program id as int64: the start of every offset that multiplies it."""
    return tl.program_id(axis).to(tl.int64)


@triton.jit
def capped(b_s, SOFTCAP: tl.constexpr):
    """Base-2 logits, capped if SOFTCAP is not 0: cap * tanh(x / cap).

    tanh(y) = 1 - 2 / (exp(2y) + 1) needs few registers, and an exponential that overflows gives 1.
    """
    if SOFTCAP > 0.0:
        b_e = tl.exp2(b_s * (2.0 / SOFTCAP))
        b_s = SOFTCAP * LOG2E - (2.0 * SOFTCAP * LOG2E) / (b_e + 1.0)
    return b_s


@triton.jit
def masked(b_s, p_mask, o_mask, m_s, MASK: tl.constexpr, HIDDEN: tl.constexpr):
    """Apply a mask to a tile of base-2 logits.

    b_s float32 tile; p_mask, o_mask: where the mask of each element is; m_s: elements that exist. Returns (b_s with
    -inf where hidden, the visible elements).
    """
    if MASK == BOOL_MASK:
        m_s = m_s & (tl.load(p_mask + o_mask, mask=m_s, other=0) != 0)
    if MASK == FLOAT_MASK:
        b_m = tl.load(p_mask + o_mask, mask=m_s, other=float("-inf")).to(tl.float32)
        m_s = m_s & (b_m > HIDDEN)
        b_s += b_m * LOG2E
    return tl.where(m_s, b_s, float("-inf")), m_s


@triton.jit
def finite(b_max):
    """A row's maximum as a number that may be subtracted: 0 for a row of -inf, so that no inf - inf gives NaN."""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit
def softmax_step(b_s, b_m, b_l):
    """One step of the online softmax over tile b_s [M, N] (base 2).

    b_m, b_l [M]: maximum and sum so far. Returns (weights [M, N], new maximum, new sum, factor [M] for what was
    accumulated before).
    """
    b_n = tl.maximum(b_m, tl.max(b_s, 1))
    b_base = finite(b_n)
    b_p = tl.exp2(b_s - b_base[:, None])
    b_f = tl.exp2(b_m - b_base)
    return b_p, b_n, b_l * b_f + tl.sum(b_p, 1), b_f


@triton.jit
def arrives(
    p_mask, i_b, position, heads, s_mb, s_mh, s_mt, HEADS: tl.constexpr, MASK: tl.constexpr, HIDDEN: tl.constexpr
):  # fmt: skip
    """1 if some head of row i_b lets the token at `position` see itself, 0 if it is padding.

    p_mask: mask of one query row per (b, head); heads <= HEADS (a power of two) is how many it has.
    """
    seen = tl.full((), 1, tl.int32)
    if MASK != NO_MASK:
        o_h = tl.arange(0, HEADS).to(tl.int64)
        p_own = p_mask + i_b * s_mb + o_h * s_mh + tl.cast(position, tl.int64) * s_mt
        if MASK == BOOL_MASK:
            b_v = tl.load(p_own, mask=o_h < heads, other=0) != 0
        else:
            b_v = tl.load(p_own, mask=o_h < heads, other=float("-inf")).to(tl.float32) > HIDDEN
        seen = tl.max(b_v.to(tl.int32), 0)
    return seen


@triton.jit
def rising(b_x):
    """int32 keys in the order of the float32 values: sign-magnitude bits turned into two's complement. -0.0 == 0.0."""
    b_i = tl.where(b_x == 0.0, 0.0, b_x).to(tl.int32, bitcast=True)
    return b_i ^ ((b_i >> 31) & 0x7FFFFFFF)


@triton.jit
def count_from(p_x, n, key, BLOCK: tl.constexpr):
    """How many of the n float32 values at p_x have a key >= `key` (int64 scalar)."""
    b_c = tl.zeros([BLOCK], tl.int32)
    for i in range(0, n, BLOCK):
        o_x = i + tl.arange(0, BLOCK)
        b_x = tl.load(p_x + o_x, mask=o_x < n, other=0.0)
        b_c += ((rising(b_x).to(tl.int64) >= key) & (o_x < n)).to(tl.int32)
    return tl.sum(b_c, 0)


@triton.jit
def kth_key(p_x, n, k, BLOCK: tl.constexpr):
    """Exact threshold of the k largest of n float32 values, k <= n, by bisection of their integer keys.

    Returns int64 scalars (sure, tied, ties): values with a key >= sure are among the k largest, and `ties` of
    those with the key `tied` (0 if none is needed). At most 32 passes over the row, fewer once a count is exact.
    """
    low = tl.full((), -2147483648, tl.int64)
    high = tl.full((), 2147483648, tl.int64)
    wanted = tl.cast(k, tl.int64)
    above_low = tl.cast(n, tl.int64)
    above_high = tl.full((), 0, tl.int64)
    while (high - low > 1) & (above_low != wanted):
        middle = (low + high) >> 1
        found = count_from(p_x, n, middle, BLOCK).to(tl.int64)
        enough = found >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        above_low = tl.where(enough, found, above_low)
        above_high = tl.where(enough, above_high, found)
    exact = above_low == wanted
    return tl.where(exact, low, high), low, tl.where(exact, 0, wanted - above_high)
