"""Device code of decode_attend, first two of three kernels: partial attention over splits of the slots, then the sum.

The new token never passes through memory within a launch: split 0 takes it from its own registers and writes it to slot
FREE, which no program of that launch reads.
"""

# mypy: ignore-errors

import triton
import triton.language as tl
from kvpass.kernels.triton_shared.triton_common import LOG2E, arrives, capped, finite, masked, rows, softmax_step


@triton.jit
def split_range(live, splits, BN: tl.constexpr):
    """Slots first .. last of this split: an even share of the blocks of slots 0 .. live."""
    share = tl.cdiv(tl.cdiv(live + 1, BN), splits) * BN
    first = tl.program_id(1) * share
    return first, tl.minimum(first + share, live + 1)


@triton.jit
def products(b_x, b_y, ONE: tl.constexpr, PRECISION: tl.constexpr):
    """b_x [GP, BD] times b_y [BN, BD] transposed -> float32 [GP, BN]; a plain sum for one row, a dot for more."""
    if ONE:
        return tl.sum(b_x.to(tl.float32) * b_y.to(tl.float32), 1)[None, :]
    return tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION)


@triton.jit
def mixed(b_p, b_v, ONE: tl.constexpr, PRECISION: tl.constexpr):
    """Weights b_p [GP, BN] times values b_v [BN, BDV] -> float32 [GP, BDV]."""
    if ONE:
        return tl.sum(tl.trans(b_p) * b_v.to(tl.float32), 0)[None, :]
    return tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)


@triton.jit(do_not_specialize=["position", "C", "splits", "s_mb", "s_mh", "s_mt"])
def split_kernel(
    p_q,
    p_knew,
    p_vnew,
    p_mask,
    p_k,
    p_v,
    p_pos,
    p_stats,
    p_cursor,
    p_logits,
    p_max,
    p_sum,
    p_acc,
    s_qb,
    s_qh,
    s_kb,
    s_kh,
    s_vb,
    s_vh,
    s_mb,
    s_mh,
    s_mt,
    mask_heads,
    scale,
    position,
    C,
    HKV,
    splits,
    G: tl.constexpr,
    GP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BN: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    LOGITS: tl.constexpr,
    MASK: tl.constexpr,
    HIDDEN: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Append the token; per split: maximum, sum [B, Hq, splits], raw output [B, Hq, splits, Dv]; logits [B, Hq, C].

    Program: (b, KV head) x split, so K and V are read once per KV head, whatever the group. G heads padded to GP.
    Logits are in base 2, -inf where hidden. An empty split writes no output.
    """
    i_r, i_s = rows(0), tl.program_id(1)
    i_b, i_h = i_r // HKV, i_r % HKV
    plane = tl.num_programs(0).to(tl.int64) * C
    live, free = tl.load(p_cursor + i_r * 4), tl.load(p_cursor + i_r * 4 + 1)
    arrived = arrives(p_mask, i_b, position, mask_heads, s_mb, s_mh, s_mt, HEADS, MASK, HIDDEN)
    o_g, o_t, o_d, o_v = tl.arange(0, GP), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    m_g, m_d, m_v = o_g < G, o_d < D, o_v < DV
    p_qg = p_q + i_b * s_qb + (i_h * G + o_g)[:, None] * s_qh + o_d[None, :]
    b_q = tl.load(p_qg, mask=m_g[:, None] & m_d[None, :], other=0.0)  # [GP, BD]
    o_mask = i_b * s_mb + (i_h * G + o_g).to(tl.int64) * s_mh
    if LOGITS:
        p_logits += (i_r * G + o_g) * C  # [GP]
    p_k += i_r * C * D
    p_v += i_r * C * DV

    mine = tl.where(i_s == 0, arrived, 0)  # this program appends the token
    m_new = tl.where(m_g, mine, 0) > 0
    b_knew = tl.load(p_knew + i_b * s_kb + i_h * s_kh + o_d, mask=m_d, other=0.0)
    b_vnew = tl.load(p_vnew + i_b * s_vb + i_h * s_vh + o_v, mask=m_v, other=0.0)
    b_own = tl.sum(b_q.to(tl.float32) * b_knew.to(tl.float32)[None, :], 1) * (scale * LOG2E)  # [GP]
    b_own = capped(b_own, SOFTCAP)
    b_max, m_seen = masked(b_own, p_mask, o_mask + tl.cast(position, tl.int64) * s_mt, m_new, MASK, HIDDEN)
    b_sum = m_seen.to(tl.float32)
    b_o = b_sum[:, None] * b_vnew.to(tl.float32)[None, :]  # [GP, BDV]
    if mine > 0:
        tl.store(p_k + free.to(tl.int64) * D + o_d, b_knew, mask=m_d)
        tl.store(p_v + free.to(tl.int64) * DV + o_v, b_vnew, mask=m_v)
        tl.store(p_pos + i_r * C + free, position)
        for n in tl.static_range(N):
            tl.store(p_stats + n * plane + i_r * C + free, 0.0)
        if LOGITS:
            tl.store(p_logits + free, b_max, mask=m_g)

    first, last = split_range(live, splits, BN)
    for i_n in range(first, last, BN):
        o_n = i_n + o_t
        m_n = (o_n < last) & (o_n != free)
        p_kn = p_k + tl.cast(i_n, tl.int64) * D + (o_t[:, None] * D + o_d[None, :])
        b_k = tl.load(p_kn, mask=m_n[:, None] & m_d[None, :], other=0.0)  # [BN, BD]
        p_vn = p_v + tl.cast(i_n, tl.int64) * DV + (o_t[:, None] * DV + o_v[None, :])
        b_v = tl.load(p_vn, mask=m_n[:, None] & m_v[None, :], other=0.0)  # [BN, BDV]
        b_s = capped(products(b_q, b_k, GP == 1, PRECISION) * (scale * LOG2E), SOFTCAP)  # [GP, BN]
        o_seen = o_mask[:, None]
        if MASK:
            b_pos = tl.load(p_pos + i_r * C + o_n, mask=m_n, other=0)
            o_seen = o_seen + b_pos.to(tl.int64)[None, :] * s_mt
        b_s, _ = masked(b_s, p_mask, o_seen, m_g[:, None] & m_n[None, :], MASK, HIDDEN)
        if LOGITS:
            tl.store(p_logits[:, None] + o_n[None, :], b_s, mask=m_g[:, None] & m_n[None, :])
        b_p, b_max, b_sum, b_f = softmax_step(b_s, b_max, b_sum)
        b_o = b_o * b_f[:, None] + mixed(b_p, b_v, GP == 1, PRECISION)
    o_part = (i_r * G + o_g) * splits + i_s
    tl.store(p_max + o_part, b_max, mask=m_g)
    tl.store(p_sum + o_part, b_sum, mask=m_g)
    m_o = (m_g & (b_sum > 0.0))[:, None] & m_v[None, :]
    tl.store(p_acc + o_part[:, None] * DV + o_v[None, :], b_o, mask=m_o)


@triton.jit(do_not_specialize=["position", "C", "splits", "s_mb", "s_mh", "s_mt"])
def combine_kernel(
    p_mask,
    p_stats,
    p_cursor,
    p_logits,
    p_max,
    p_sum,
    p_acc,
    p_sinks,
    p_out,
    s_mb,
    s_mh,
    s_mt,
    mask_heads,
    position,
    C,
    HKV,
    splits,
    G: tl.constexpr,
    GP: tl.constexpr,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    BDV: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
    ADD: tl.constexpr,
    MEAN: tl.constexpr,
    SUM: tl.constexpr,
    SUMSQ: tl.constexpr,
    COUNT: tl.constexpr,
    MASK: tl.constexpr,
    HIDDEN: tl.constexpr,
    SINKS: tl.constexpr,
):
    """out [B, Hq, 1, Dv] from the splits; statistics of the slots from the logits, if any of SUM, SUMSQ, COUNT is >= 0.

    Same grid as split_kernel: a program sums the splits of every `splits`-th head of its group, and updates the
    statistics of its share of the slots with a = mean or max over the group of 2^(logit - lse). BS >= splits, a power
    of two; BC: splits summed at once.
    """
    i_r, i_s = rows(0), tl.program_id(1)
    o_g, o_s, o_v = tl.arange(0, GP), tl.arange(0, BS), tl.arange(0, BDV)
    o_part = (i_r * G + o_g)[:, None] * splits + o_s[None, :]
    m_part = (o_g < G)[:, None] & (o_s < splits)[None, :]
    b_m = tl.load(p_max + o_part, mask=m_part, other=float("-inf"))  # [GP, BS]
    b_l = tl.load(p_sum + o_part, mask=m_part, other=0.0)
    b_max = tl.max(b_m, 1)
    if SINKS:  # here and not in the splits: once per head
        p_sink = p_sinks + tl.program_id(0) % HKV * G + o_g
        b_sink = tl.load(p_sink, mask=o_g < G, other=float("-inf")).to(tl.float32) * LOG2E
        b_max = tl.maximum(b_max, b_sink)
    b_max = finite(b_max)
    b_sum = tl.sum(b_l * tl.exp2(b_m - b_max[:, None]), 1)
    if SINKS:
        b_sum += tl.exp2(b_sink - b_max)
    b_lse = tl.where(b_sum == 0.0, float("inf"), b_max + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum)))  # [GP]
    for g in range(i_s, G, splits):
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
    if SUM >= 0 or SUMSQ >= 0 or COUNT >= 0:  # noqa: SIM102 (decided when compiling)
        if arrives(p_mask, i_r // HKV, position, mask_heads, s_mb, s_mh, s_mt, HEADS, MASK, HIDDEN) > 0:
            plane = tl.num_programs(0).to(tl.int64) * C
            first, last = split_range(tl.load(p_cursor + i_r * 4), splits, BN)
            for i_n in range(first, last, BN):
                o_n = i_n + tl.arange(0, BN)
                m_n = o_n < last
                p_l = p_logits + (i_r * G + o_g)[:, None] * C + o_n[None, :]
                b_s = tl.load(p_l, mask=(o_g < G)[:, None] & m_n[None, :], other=float("-inf"))  # [GP, BN]
                b_p = tl.exp2(b_s - b_lse[:, None])
                b_a = tl.sum(b_p, 0) * (1.0 / G) if MEAN else tl.max(b_p, 0)  # [BN]
                b_c = (tl.max(b_s, 0) > float("-inf")).to(tl.float32)
                observe(p_stats + i_r * C + o_n, plane, b_a, m_n, SUM, ADD)
                observe(p_stats + i_r * C + o_n, plane, b_a * b_a, m_n, SUMSQ, ADD)
                observe(p_stats + i_r * C + o_n, plane, b_c, m_n, COUNT, ADD)


@triton.jit
def observe(p_row, plane, b_x, m_x, INDEX: tl.constexpr, ADD: tl.constexpr):
    """Add b_x to statistic INDEX of the slots at p_row, or replace it. -1: not kept."""
    if INDEX >= 0:
        p_x = p_row + INDEX * plane
        if ADD:
            b_x += tl.load(p_x, mask=m_x, other=0.0)
        tl.store(p_x, b_x, mask=m_x)
