"""Device code of decode_attend: which slot goes. Programs of a row search shares of its slots; the last that is done
picks among what they found, and ends the step.

Scores and orders are those of `kvpass.kernels.rank.ranking`, rounded as torch rounds them (true division and root).
"""

# mypy: ignore-errors

import triton
import triton.language as tl
from kvpass.kernels.triton_shared.triton_common import count_from, kth_key, rising

BY_POSITION = tl.constexpr(0)
BY_SUM = tl.constexpr(1)
BY_MEAN = tl.constexpr(2)
BY_SHARE = tl.constexpr(3)
BY_AGE = tl.constexpr(4)
BY_SCORE = tl.constexpr(5)
UNTOUCHABLE = tl.constexpr(3.0e38)
UNSCORED = tl.constexpr(2.0**125)
KEEP = tl.constexpr(1048576.0)
LEAST = tl.constexpr(-2139095040)
"""`rising` of the smallest number: -inf is below it."""


@triton.jit
def kept(p_slot, plane, o_c, m_c, INDEX: tl.constexpr):
    """A statistic of slots o_c. p_slot: of the first statistic, the row's first slot."""
    return tl.load(p_slot + INDEX * plane + o_c, mask=m_c, other=1.0)


@triton.jit
def base_score(
    p_slot, plane, o_c, m_c, b_pos, seen,
    SCORE: tl.constexpr, BY: tl.constexpr, COUNT: tl.constexpr, NUMBER: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Scores of one head, before the heads' mean and a value weight: float32. seen: the row's tokens, with this one."""
    b_x = b_pos.to(tl.float32) if SCORE == BY_POSITION else kept(p_slot, plane, o_c, m_c, BY)
    if (SCORE == BY_MEAN) | (SCORE == BY_SHARE):
        b_x = tl.div_rn(b_x, tl.maximum(kept(p_slot, plane, o_c, m_c, COUNT), 1.0))
    if SCORE == BY_AGE:
        b_x = b_x - 1.0 - (seen - 1).to(tl.float32)
    if DECAY:
        if NUMBER >= 0:
            b_x = b_x * ((seen - 1).to(tl.float32) - kept(p_slot, plane, o_c, m_c, NUMBER))
        else:
            b_x = b_x * (seen - 1 - b_pos).to(tl.float32)
    return b_x


@triton.jit
def deviation(p_slot, plane, o_c, m_c, SUM: tl.constexpr, SUMSQ: tl.constexpr, COUNT: tl.constexpr):
    """Standard deviation of the probabilities that slots were given (RoCo). No fused multiply-add (the launch turns
    fusion off): two that torch finds equal must be equal here.
    """
    b_count = tl.maximum(kept(p_slot, plane, o_c, m_c, COUNT), 1.0)
    b_mean = tl.div_rn(kept(p_slot, plane, o_c, m_c, SUM), b_count)
    b_var = tl.div_rn(kept(p_slot, plane, o_c, m_c, SUMSQ), b_count) - b_mean * b_mean
    return tl.sqrt_rn(tl.maximum(b_var, 0.0))


@triton.jit
def safe(p_slot, plane, o_c, m_c, b_pos, old, young, NUMBER: tl.constexpr, MARK: tl.constexpr):
    """Which slots are protected: those of the first and the last tokens, and marked ones."""
    b_where = b_pos
    if NUMBER >= 0:
        b_where = kept(p_slot, plane, o_c, m_c, NUMBER).to(tl.int32)
    b_safe = (b_where < old) | (b_where >= young)
    if MARK >= 0:
        b_safe = b_safe | (kept(p_slot, plane, o_c, m_c, MARK) >= KEEP)
    return b_safe


@triton.jit
def search(
    p_slot, p_pos, p_preference, plane, begin, used, stride, seen, old, young, sure, tied, limit, apart, i_h, heads,
    BLOCK: tl.constexpr, TOP: tl.constexpr, ALL: tl.constexpr, SCORE: tl.constexpr,
    BY: tl.constexpr, COUNT: tl.constexpr, NUMBER: tl.constexpr, MARK: tl.constexpr, WEIGHT: tl.constexpr,
    FLOOR: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Of slots begin .. of a head, blocks `stride` apart: the lowest score, and position and slot of the newest that
    has it. Protected ones have +inf.

    ALL: scores are means over the `heads` heads, whose rows are `apart` apart, this one being number i_h. TOP:
    preferences of a key >= `sure`, and those of key `tied` up to position `limit`, are out of reach.
    """
    b_best = tl.full([BLOCK], float("inf"), tl.float32)
    b_age = tl.full([BLOCK], -1, tl.int32)
    b_slot = tl.zeros([BLOCK], tl.int32)
    for i in range(begin, used, stride):
        o_c = i + tl.arange(0, BLOCK)
        m_c = o_c < used
        b_pos = tl.load(p_pos + o_c, mask=m_c, other=-1)
        if ALL:
            b_x = tl.zeros([BLOCK], tl.float32)
            for h in range(heads):
                p_head = p_slot + (h - i_h) * apart
                b_x += base_score(p_head, plane, o_c, m_c, b_pos, seen, SCORE, BY, COUNT, NUMBER, DECAY)
            b_x = tl.div_rn(b_x, tl.zeros([BLOCK], tl.float32) + heads)
        else:
            b_x = base_score(p_slot, plane, o_c, m_c, b_pos, seen, SCORE, BY, COUNT, NUMBER, DECAY)
        if WEIGHT >= 0:
            b_w = (b_x + FLOOR) * kept(p_slot, plane, o_c, m_c, WEIGHT)
            b_x = tl.where(b_x >= UNSCORED, b_x, b_w) if SCORE == BY_SCORE else b_w
        if TOP:
            b_key = rising(tl.load(p_preference + o_c, mask=m_c, other=0.0)).to(tl.int64)
            b_x = tl.where((b_key >= sure) | ((b_key == tied) & (b_pos <= limit)), UNTOUCHABLE, b_x)
        b_x = tl.where(safe(p_slot, plane, o_c, m_c, b_pos, old, young, NUMBER, MARK), float("inf"), b_x)
        m_lower = m_c & ((b_x < b_best) | ((b_x == b_best) & (b_pos > b_age)))
        b_best = tl.where(m_lower, b_x, b_best)
        b_age = tl.where(m_lower, b_pos, b_age)
        b_slot = tl.where(m_lower, o_c, b_slot)
    return lowest_of(b_best, b_age, b_slot)


@triton.jit
def lowest_of(b_best, b_age, b_slot):
    """The lowest score, and position and slot of the newest that has it."""
    best = tl.min(b_best, 0)
    age = tl.max(tl.where(b_best == best, b_age, -1), 0)
    return best, age, tl.max(tl.where((b_best == best) & (b_age == age), b_slot, 0), 0)


@triton.jit
def oldest_ties(p_x, p_pos, n, tied, ties, BLOCK: tl.constexpr):
    """Position of the ties-th oldest slot whose preference has the key `tied`; -1 for no ties; all differ."""
    low, high = tl.full((), -1, tl.int64), tl.full((), 2147483647, tl.int64)
    high = tl.where(ties > 0, high, low)
    while high - low > 1:
        middle = (low + high) >> 1
        b_c = tl.zeros([BLOCK], tl.int32)
        for i in range(0, n, BLOCK):
            o_c = i + tl.arange(0, BLOCK)
            b_key = rising(tl.load(p_x + o_c, mask=o_c < n, other=0.0)).to(tl.int64)
            b_pos = tl.load(p_pos + o_c, mask=o_c < n, other=-1)
            b_c += ((b_key == tied) & (b_pos <= middle) & (o_c < n)).to(tl.int32)
        enough = tl.sum(b_c, 0) >= ties
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle)
    return high


@triton.jit
def prefer(
    p_slot, p_pos, p_preference, plane, begin, used, stride, seen, old, young,
    BLOCK: tl.constexpr, TOP: tl.constexpr, SCORE: tl.constexpr, BY: tl.constexpr, SUM: tl.constexpr,
    SUMSQ: tl.constexpr, COUNT: tl.constexpr, NUMBER: tl.constexpr, MARK: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """What decides which slots are out of reach, of slots begin .. in blocks `stride` apart: deviations (TOP 1), or
    scores before their weight (TOP 2); -inf where protected.
    """
    for i in range(begin, used, stride):
        o_c = i + tl.arange(0, BLOCK)
        m_c = o_c < used
        b_pos = tl.load(p_pos + o_c, mask=m_c, other=-1)
        if TOP == 1:
            b_x = deviation(p_slot, plane, o_c, m_c, SUM, SUMSQ, COUNT)
        else:
            b_x = base_score(p_slot, plane, o_c, m_c, b_pos, seen, SCORE, BY, COUNT, NUMBER, DECAY)
        b_safe = safe(p_slot, plane, o_c, m_c, b_pos, old, young, NUMBER, MARK)
        tl.store(p_preference + o_c, tl.where(b_safe, float("-inf"), b_x), mask=m_c)


@triton.jit
def reach(
    p_preference, p_pos, used, size, TOP: tl.constexpr, NUM: tl.constexpr, DEN: tl.constexpr, BLOCK: tl.constexpr
):
    """Keys and position from which on preferences are out of reach, see `search`. Protected slots come first."""
    exposed = count_from(p_preference, used, LEAST, BLOCK)
    wanted = size * NUM // DEN - (used - exposed)
    if TOP == 1:
        wanted += 1
    wanted = tl.minimum(tl.maximum(wanted, 0), exposed)
    sure, tied, ties = kth_key(p_preference, used, wanted, BLOCK)
    return sure, tied, oldest_ties(p_preference, p_pos, used, tied, ties, BLOCK)
