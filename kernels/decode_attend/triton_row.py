"""Device helpers of decode_attend: what a program knows of its row of slots before it reads one of them."""

# mypy: ignore-errors

import triton
import triton.language as tl
from kvpass.kernels.triton_shared.triton_common import NO_MASK, arrives


@triton.jit
def now(p_at, position, AT: tl.constexpr):
    """The token's position, int32: on the device if AT, else as the host said."""
    if AT:
        position = tl.load(p_at).to(tl.int32)
    return position


@triton.jit
def slot_zero(p_cursor, i_r, C, COLUMNS: tl.constexpr):
    """Place of slot 0 of row i_r (int64) in the flattened memory."""
    place = i_r * C
    if COLUMNS > 4:
        place += tl.load(p_cursor + i_r * COLUMNS + 5)
    return place


@triton.jit
def lowest(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first position that a query at `position` sees (`Sees.lowest`)."""
    low = position * 0
    if WINDOW > 0:
        low = tl.maximum(low, position - WINDOW + 1)
    if CHUNK > 0:
        low = tl.maximum(low, position // CHUNK * CHUNK)
    return low


@triton.jit
def sight(
    p_mask, p_bounds, p_first, i_b, position, mask_heads, s_mb, s_mh, s_mt, s_nb,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, MASK: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """What the words and a call's bounds say of row i_b: (1 if the token has arrived, else 0; the first position that
    its query sees; 1 if that hides slots; 1 if the tokens may hide slots).

    p_bounds: of `token_bounds`, rows s_nb apart; p_first: FIRST in the cursor. Exact where both say 0: then every slot
    is seen, so neither its position nor the tokens are read.
    """
    low = lowest(position, WINDOW, CHUNK)
    begin = tl.load(p_first)
    begin = tl.where(begin < 0, position, begin)
    arrived = tl.full((), 1, tl.int32)
    asks = tl.full((), 0, tl.int32)
    if TOKENS:
        p_own = p_bounds + i_b * s_nb
        first, end, before = tl.load(p_own), tl.load(p_own + 1), tl.load(p_own + 2)
        arrived = ((end == position + 1) & (tl.load(p_own + 3) > 0)).to(tl.int32)
        apart = (before == 0) | (first > begin) | (before != position - first)
        asks = ((begin < position) & apart).to(tl.int32)
    if MASK != NO_MASK:
        arrived = arrives(p_mask, i_b, position, mask_heads, s_mb, s_mh, s_mt, HEADS, MASK, HIDDEN)
    return arrived, low, (low > begin).to(tl.int32), asks


@triton.jit
def shown(p_pos, p_tokens, o_n, m_n, low, far, asks, WORDS: tl.constexpr, TOKENS: tl.constexpr):
    """Which of slots o_n that exist (m_n) the words and the tokens show. p_pos, p_tokens: of the row. Reads nothing
    where `sight` says that nothing is hidden.
    """
    if WORDS or TOKENS:
        b_pos = tl.load(p_pos + o_n, mask=tl.where(m_n, far | asks, 0) > 0, other=2147483647)
        m_n = m_n & (b_pos >= low)
        if TOKENS:
            b_token = tl.load(p_tokens + b_pos, mask=tl.where(m_n, asks, 0) > 0, other=1)
            m_n = m_n & (b_token != 0)
    return m_n


@triton.jit
def resized(size, slots, num, den, layer, OBSERVED: tl.constexpr, BETA: tl.constexpr, LAYERS: tl.constexpr):
    """The budget in a pyramid (`kvpass.kernels.rank.pyramid`), int64."""
    if (BETA > 0) & (LAYERS > 1):
        base = size - OBSERVED
        fixed = slots > 0
        flat = tl.where(fixed, 0, base * (2 * num - den) // num)
        low = tl.maximum(tl.maximum(base // BETA, flat), 1)
        sized = size - base + (low * layer + (2 * base - low) * (LAYERS - 1 - layer)) // (LAYERS - 1)
        size = tl.where(base < tl.where(fixed, BETA, 1), size, sized)
    return size


@triton.jit
def step_of(
    p_cursor, position, slots, num, den, floor, layer,
    COLUMNS: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, RECENT_NUM: tl.constexpr,
    RECENT_DEN: tl.constexpr, HALVED: tl.constexpr, NUMBERED: tl.constexpr, OBSERVED: tl.constexpr,
    BETA: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    """A step in numbers, the cursor (one head's) as before it: slots used with the new token, tokens seen with it,
    position of the first, budget, protected recent tokens, the ends of the unprotected: old <= where < young, and
    whether padding stands between tokens, so that those ends, which are positions, must be counted out (`ends`).

    NUMBERED: `where` is a slot's number among the valid tokens, which padding does not part.
    """
    used, seen, first = tl.load(p_cursor) + 1, tl.load(p_cursor + 2) + 1, tl.load(p_cursor + 3)
    first = tl.where(first < 0, position, first).to(tl.int32)
    size = tl.maximum(floor, seen.to(tl.int64) * num // den)
    size = tl.where(slots > 0, slots, size)
    size = resized(size, slots, num, den, layer, OBSERVED, BETA, LAYERS)
    if COLUMNS > 4:
        size += tl.load(p_cursor + 4)
    recent = RECENT + size * RECENT_NUM // RECENT_DEN
    if HALVED:
        recent = tl.minimum((size - SINKS) // 2, recent)
    parted = position + 1 - first > seen
    old, young = first.to(tl.int64) + SINKS, position + 1 - recent
    if NUMBERED:
        old, young = old * 0 + SINKS, seen - recent
        parted = parted & False
    return used, seen, first, size, recent, old, young, parted


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
def ends(p_pos, used, recent, position, SINKS: tl.constexpr, BLOCK: tl.constexpr):
    """The ends of the unprotected positions where padding stands between tokens: positions do not count them, but the
    slots of the first and of the last tokens are all in use, so their ranks do.
    """
    young = nth_largest(p_pos, used, recent, position + 1, BLOCK)
    old = young * 0
    if SINKS > 0:
        old = nth_largest(p_pos, used, used - SINKS + 1, position + 1, BLOCK) + 1
    return old, young


@triton.jit
def partials(p_scratch, C, splits, G: tl.constexpr, DV: tl.constexpr):
    """What split_kernel leaves, in one piece of memory: raw outputs [rows, G, splits, DV], maxima and sums
    [rows, G, splits], logits [G, rows * C].
    """
    each = tl.num_programs(0).to(tl.int64) * G * splits
    p_max = p_scratch + each * DV
    return p_scratch, p_max, p_max + each, p_max + 2 * each


@triton.jit
def candidates(p_whole, p_scratch, C, splits, G: tl.constexpr, DV: tl.constexpr, LOGITS: tl.constexpr):
    """What follows in that memory: scores of candidates [rows, programs] and preferences of slots [rows * C]; and in
    that of integers, behind a counter and `splits` counts of seen slots for each row: the candidates' positions and
    slots.
    """
    n = tl.num_programs(0).to(tl.int64)
    p_best = p_scratch + n * G * splits * (DV + 2)
    if LOGITS:
        p_best += n * C * G
    programs = tl.num_programs(1)
    p_age = p_whole + n * (1 + splits)
    return p_best, p_best + n * programs, p_age, p_age + n * programs
