"""Device code of prefill_attend: who sees whom, from words and tokens (`kvpass.kernels.attention.visibility`).

Mostly loop bounds; comparisons only in blocks that are seen in part. CAUSAL: 1 up to the query's position, 2 up to its
place in the call (`corner`), 0 not at all; WINDOW and CHUNK: positions, 0 for none.
"""

# mypy: ignore-errors

import triton
import triton.language as tl
from kvpass.kernels.attention import visibility

FIRST = tl.constexpr(visibility.FIRST)
END = tl.constexpr(visibility.END)
COUNT = tl.constexpr(visibility.COUNT)

LOOSE = ["S", "L", "position", "s_mb", "s_mh", "s_mq", "s_tb", "tiles_q", "tiles_k"]
"""Numbers that change from call to call, for which kernels over queries and keys have no variants."""


@triton.jit
def key_positions(p_pos, o_n, m_n, POS: tl.constexpr):
    """Positions of keys o_n and which of them exist. p_pos: the row's positions, or None if key l is at position l."""
    if POS:
        b_pos = tl.load(p_pos + o_n, mask=m_n, other=-1)
        return b_pos, b_pos >= 0
    return o_n, m_n


@triton.jit
def by_words(m, b_pos, b_i, position, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """m where the words show keys at positions b_pos to queries b_i of a call that begins at `position`."""
    b_p = b_i + position
    if CAUSAL == 1:
        m = m & (b_pos <= b_p)
    if CAUSAL == 2:
        m = m & (b_pos <= b_i)
    if WINDOW > 0:
        m = m & (b_pos > b_p - WINDOW)
    if CHUNK > 0:
        m = m & (b_pos // CHUNK == b_p // CHUNK)
    return m


@triton.jit
def token_span(p_bounds, end):
    """Of a row: the first column that holds a token, one past the last (at most `end`), and whether (1 or 0) others
    stand between.
    """
    first, last = tl.load(p_bounds + FIRST), tl.load(p_bounds + END)
    holes = tl.load(p_bounds + COUNT) != last - first
    return first, tl.minimum(last, end), holes.to(tl.int32)


@triton.jit
def by_tokens(m, p_tokens, b_pos, first, last, holes):
    """m where columns b_pos hold a token; columns are read only if a row has holes."""
    m = m & (b_pos >= first) & (b_pos < last)
    unread = tl.where(holes != 0, first, last)
    return m & (tl.load(p_tokens + b_pos, mask=m & (b_pos >= unread), other=1) != 0)


@triton.jit
def seen_keys(
    top, bottom, position, first, last, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Of keys first .. last - 1, each at its position: those that some of the queries top .. bottom see (first, last),
    and those that all of them see (low, high).
    """
    low, high = first, last
    if CAUSAL > 0:
        at = position
        if CAUSAL == 2:
            at = 0
        last = tl.minimum(last, bottom + at + 1)
        high = tl.minimum(high, top + at + 1)
    if WINDOW > 0:
        first = tl.maximum(first, top + position - WINDOW + 1)
        low = tl.maximum(low, bottom + position - WINDOW + 1)
    if CHUNK > 0:
        i_top, i_bottom = (top + position) // CHUNK, (bottom + position) // CHUNK
        first, low = tl.maximum(first, i_top * CHUNK), tl.maximum(low, i_bottom * CHUNK)
        last, high = tl.minimum(last, (i_bottom + 1) * CHUNK), tl.minimum(high, (i_top + 1) * CHUNK)
    return first, last, low, high


@triton.jit
def seeing_queries(
    left, right, position, first, last, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Of queries first .. last - 1: those that see some of the keys at positions left .. right (first, last), and those
    that see all of them (low, high).
    """
    low, high = first, last
    if CAUSAL > 0:
        at = position
        if CAUSAL == 2:
            at = 0
        first = tl.maximum(first, left - at)
        low = tl.maximum(low, right - at)
    if WINDOW > 0:
        last = tl.minimum(last, right - position + WINDOW)
        high = tl.minimum(high, left - position + WINDOW)
    if CHUNK > 0:
        i_left, i_right = left // CHUNK, right // CHUNK
        first, low = tl.maximum(first, i_left * CHUNK - position), tl.maximum(low, i_right * CHUNK - position)
        last = tl.minimum(last, (i_right + 1) * CHUNK - position)
        high = tl.minimum(high, (i_left + 1) * CHUNK - position)
    return first, last, low, high


@triton.jit
def parted(first, last, low, high, BLOCK: tl.constexpr):
    """Loop bounds (first, low, high, last) of blocks: low .. high are seen by all, the others in part."""
    first = first // BLOCK * BLOCK
    end = tl.cdiv(last, BLOCK) * BLOCK
    low = tl.minimum(tl.maximum(tl.cdiv(low, BLOCK) * BLOCK, first), end)
    return first, low, tl.maximum(tl.minimum(high, last) // BLOCK * BLOCK, low), last
