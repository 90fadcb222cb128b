"""Device code of prefill_attend: flash attention, and the second pass that gives each key its statistics."""

# mypy: ignore-errors

import triton
import triton.language as tl
from kvpass.kernels.triton_shared.triton_common import LOG2E, capped, finite, masked, rows, softmax_step

from .triton_survey import covered


@triton.jit
def key_positions(p_pos, o_n, m_n, POS: tl.constexpr):
    """Positions of keys o_n and which of them exist. p_pos: the row's positions, or None if key l is at position l."""
    if POS:
        b_pos = tl.load(p_pos + o_n, mask=m_n, other=-1)
        return b_pos, b_pos >= 0
    return o_n, m_n


@triton.jit(do_not_specialize=["S", "L", "s_mb", "s_mh", "s_mq"])
def attend_kernel(
    p_q,
    p_k,
    p_v,
    p_pos,
    p_mask,
    p_span,
    p_sinks,
    p_out,
    p_lse,
    s_qb,
    s_qh,
    s_qs,
    s_kb,
    s_kh,
    s_kl,
    s_vb,
    s_vh,
    s_vl,
    s_mb,
    s_mh,
    s_mq,
    s_mt,
    scale,
    S,
    L,
    HQ,
    G,
    spanning,
    tiles,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    POS: tl.constexpr,
    MASK: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """out [B, Hq, S, Dv] = softmax(q k^T scale + mask) v; lse [B, Hq, S], base 2, +inf (or the sink) if blind.

    Program: (b, query head) x query block, the longest blocks first. p_span [B, spanning, tiles, 2]: which key tiles a
    query tile can see at all.
    """
    i_r, i_m = rows(0), tl.num_programs(1) - 1 - tl.program_id(1)
    i_b, i_h = i_r // HQ, i_r % HQ
    i_kv = i_h // G
    o_m, o_t = i_m * BM + tl.arange(0, BM), tl.arange(0, BN)
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BDV)
    m_m, m_d, m_v = o_m < S, o_d < D, o_v < DV
    p_k += i_b * s_kb + i_kv * s_kh
    p_v += i_b * s_vb + i_kv * s_vh
    if POS:
        p_pos += (i_b * (HQ // G) + i_kv) * L
    if MASK:
        p_mask += i_b * s_mb + i_h * s_mh + tl.cast(i_m * BM, tl.int64) * s_mq
    p_qm = p_q + i_b * s_qb + i_h * s_qh + tl.cast(i_m * BM, tl.int64) * s_qs
    p_qm += tl.arange(0, BM)[:, None] * s_qs + o_d[None, :]
    b_q = tl.load(p_qm, mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BM, BD]
    first, last = 0, L
    if MASK:
        i_span = i_b * spanning + i_h // (HQ // spanning)
        first, last = covered(p_span + i_span * tiles * 2, i_m * BM, tiles, L, BM)
    if CAUSAL and not POS:
        last = tl.minimum(last, (i_m + 1) * BM)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    if SINKS:  # as if a key had been seen whose value is zero
        b_max = tl.zeros([BM], tl.float32) + tl.load(p_sinks + i_h).to(tl.float32) * LOG2E
        b_sum += 1.0
    b_o = tl.zeros([BM, BDV], tl.float32)
    for i_n in range(first, last, BN):
        o_n = i_n + o_t
        m_n = o_n < L
        p_kn = p_k + tl.cast(i_n, tl.int64) * s_kl + (o_t[None, :] * s_kl + o_d[:, None])
        b_k = tl.load(p_kn, mask=m_n[None, :] & m_d[:, None], other=0.0)  # [BD, BN]
        b_pos, m_key = key_positions(p_pos, o_n, m_n, POS)
        m_s = m_m[:, None] & m_key[None, :]
        if CAUSAL:
            m_s = m_s & (b_pos[None, :] <= o_m[:, None])
        b_s = capped(tl.dot(b_q, b_k, input_precision=PRECISION) * (scale * LOG2E), SOFTCAP)  # [BM, BN]
        o_mask = tl.arange(0, BM)[:, None] * s_mq + b_pos[None, :] * s_mt
        b_s, m_s = masked(b_s, p_mask, o_mask, m_s, MASK, HIDDEN)
        b_p, b_max, b_sum, b_f = softmax_step(b_s, b_max, b_sum)
        p_vn = p_v + tl.cast(i_n, tl.int64) * s_vl + (o_t[:, None] * s_vl + o_v[None, :])
        b_v = tl.load(p_vn, mask=m_n[:, None] & m_v[None, :], other=0.0)  # [BN, BDV]
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_f[:, None], input_precision=PRECISION)  # [BM, BDV]
    m_blind = b_sum == 0.0
    b_o = b_o / tl.where(m_blind, 1.0, b_sum)[:, None]
    p_om = p_out + (i_r * S + i_m * BM) * DV + (tl.arange(0, BM)[:, None] * DV + o_v[None, :])
    tl.store(p_om, b_o.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_v[None, :])
    b_lse = tl.where(m_blind, float("inf"), finite(b_max) + tl.log2(tl.where(m_blind, 1.0, b_sum)))
    tl.store(p_lse + i_r * S + o_m, b_lse, mask=m_m)


@triton.jit(do_not_specialize=["S", "L", "s_mb", "s_mh", "s_mq"])
def statistics_kernel(
    p_q,
    p_k,
    p_pos,
    p_mask,
    p_span,
    p_lse,
    p_valid,
    p_start,
    p_end,
    p_stats,
    s_qb,
    s_qh,
    s_qs,
    s_kb,
    s_kh,
    s_kl,
    s_mb,
    s_mh,
    s_mq,
    s_mt,
    scale,
    S,
    L,
    HKV,
    spanning,
    tiles,
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    POS: tl.constexpr,
    MASK: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    MEAN: tl.constexpr,
    SUM: tl.constexpr,
    SUMSQ: tl.constexpr,
    COUNT: tl.constexpr,
):
    """stats [N, B, Hkv, L]: sums over observing queries i of a_ij, a_ij^2 and visibility; rows SUM, SUMSQ, COUNT or -1.

    a_ij = mean or max over the G heads of 2^(logit_ij - lse_i). Observing: all valid queries (WINDOW -1), or those from
    p_start[b] to p_end[b], which are the last WINDOW of them. Program: (b, KV head) x key block; the tile is
    transposed, [keys, queries], so that the sums over queries stay within a warp.
    """
    i_r, i_n = rows(0), tl.program_id(1)
    i_b, i_h = i_r // HKV, i_r % HKV
    o_n, o_t = i_n * BN + tl.arange(0, BN), tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_n, m_d = o_n < L, o_d < D
    p_kn = p_k + i_b * s_kb + i_h * s_kh + tl.cast(i_n * BN, tl.int64) * s_kl
    p_kn += tl.arange(0, BN)[:, None] * s_kl + o_d[None, :]
    b_k = tl.load(p_kn, mask=m_n[:, None] & m_d[None, :], other=0.0)  # [BN, BD]
    if POS:
        p_pos += i_r * L
    b_pos, m_key = key_positions(p_pos, o_n, m_n, POS)
    first, last = 0, S
    if MASK:
        i_span = i_b * spanning + i_h // (HKV // spanning)
        first, last = covered(p_span + i_span * tiles * 2, i_n * BN, tiles, S, BN)
    if CAUSAL and not POS:
        first = tl.maximum(first, i_n * BN)
    start, end = 0, S
    if WINDOW > 0:
        start = tl.maximum(end - WINDOW, 0)
        if MASK:
            start, end = tl.load(p_start + i_b), tl.load(p_end + i_b)
        first, last = tl.maximum(first, start), tl.minimum(last, end)
    b_sum = tl.zeros([BN], tl.float32)
    b_square = tl.zeros([BN], tl.float32)
    b_count = tl.zeros([BN], tl.float32)
    for i_m in range(first, last, BM):
        o_m = i_m + o_t
        m_m = o_m < S
        m_watched = (o_m >= start) & (o_m < end)
        if MASK:
            m_watched = m_watched & (tl.load(p_valid + i_b * S + o_m, mask=m_m, other=0) != 0)
        m_pair = m_key[:, None] & m_watched[None, :]
        if CAUSAL:
            m_pair = m_pair & (b_pos[:, None] <= o_m[None, :])
        o_mask = o_t[None, :] * s_mq + b_pos[:, None] * s_mt
        b_a = tl.zeros([BN, BM], tl.float32)
        b_seen = tl.zeros([BN, BM], tl.float32)
        for g in range(G):
            i_q = i_h * G + g
            p_qm = p_q + i_b * s_qb + i_q * s_qh + tl.cast(i_m, tl.int64) * s_qs
            p_qm += o_t[None, :] * s_qs + o_d[:, None]
            b_q = tl.load(p_qm, mask=m_m[None, :] & m_d[:, None], other=0.0)  # [BD, BM]
            b_lse = tl.load(p_lse + (i_r * G + g) * S + o_m, mask=m_m, other=float("inf"))
            b_s = capped(tl.dot(b_k, b_q, input_precision=PRECISION) * (scale * LOG2E), SOFTCAP)  # [BN, BM]
            p_m = p_mask
            if MASK:
                p_m += i_b * s_mb + i_q * s_mh + tl.cast(i_m, tl.int64) * s_mq
            b_s, m_s = masked(b_s, p_m, o_mask, m_pair, MASK, HIDDEN)
            b_p = tl.exp2(b_s - b_lse[None, :])
            if MEAN:
                b_a += b_p * (1.0 / G)
            else:
                b_a = tl.maximum(b_a, b_p)
            if COUNT >= 0:
                b_seen = tl.maximum(b_seen, m_s.to(tl.float32))
        if SUM >= 0:
            b_sum += tl.sum(b_a, 1)
        if SUMSQ >= 0:
            b_square += tl.sum(b_a * b_a, 1)
        if COUNT >= 0:
            b_count += tl.sum(b_seen, 1)
    plane = tl.num_programs(0).to(tl.int64) * L
    p_row = p_stats + i_r * L + o_n
    if SUM >= 0:
        tl.store(p_row + SUM * plane, b_sum, mask=m_n)
    if SUMSQ >= 0:
        tl.store(p_row + SUMSQ * plane, b_square, mask=m_n)
    if COUNT >= 0:
        tl.store(p_row + COUNT * plane, b_count, mask=m_n)
