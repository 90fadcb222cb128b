"""Device code of prefill_attend's second pass: what each key got of the observed queries."""

# mypy: ignore-errors

import triton
import triton.language as tl
from kvpass.kernels.triton_shared.triton_common import LOG2E, capped, masked, rows

from .triton_survey import covered, whole
from .triton_visibility import LOOSE, by_tokens, by_words, key_positions, parted, seeing_queries, token_span


@triton.jit
def observe_queries(
    b_k,
    b_sum,
    b_square,
    b_count,
    b_pos,
    m_key,
    first,
    last,
    start,
    end,
    i_n,
    i_q,
    p_q,
    p_mask,
    p_whole,
    p_lse,
    p_valid,
    s_qh,
    s_qs,
    s_mh,
    s_mq,
    s_mt,
    scale,
    position,
    S,
    sharing,
    tiles_q,
    tiles_k,
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    MASK: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MEAN: tl.constexpr,
    SUM: tl.constexpr,
    SUMSQ: tl.constexpr,
    COUNT: tl.constexpr,
    FULL: tl.constexpr,
):
    """Add queries first .. last to the sums of a block of keys b_k [BN, BD]: (sum, sum of squares, count) so far.

    FULL: all of these queries are observed and see all of the keys. first and last are then multiples of BM. Pointers
    are those of the group's first head i_q, but p_whole is its row's; `sharing` heads have one survey.
    """
    o_t, o_d = tl.arange(0, BM), tl.arange(0, BD)
    DIRECT: tl.constexpr = MEAN and SUMSQ < 0  # sums of means need no tile that gathers the heads
    for i_m in range(first, last, BM):
        o_m = i_m + o_t
        m_m = o_m < S
        if not FULL:
            m_watched = m_m & (o_m >= start) & (o_m < end)
            if MASK or TOKENS:
                m_watched = m_watched & (tl.load(p_valid + o_m, mask=m_m, other=0) != 0)
            m_pair = by_words(
                m_key[:, None] & m_watched[None, :], b_pos[:, None], o_m[None, :], position, CAUSAL, WINDOW, CHUNK
            )
        if not DIRECT:
            b_a = tl.zeros([BN, BM], tl.float32)
        if MASK:
            b_seen = tl.zeros([BN, BM], tl.float32)
        for g in range(G):
            i_g = tl.cast(g, tl.int64)
            p_qm = p_q + i_g * s_qh + tl.cast(i_m, tl.int64) * s_qs + (o_t[None, :] * s_qs + o_d[:, None])
            if FULL and D == BD:
                b_q = tl.load(p_qm)  # [BD, BM]
            else:
                b_q = tl.load(p_qm, mask=m_m[None, :] & (o_d < D)[:, None], other=0.0)
            b_lse = tl.load(p_lse + i_g * S + o_m, mask=m_m, other=float("inf")) * LOG2E
            b_s = capped(tl.dot(b_k, b_q, input_precision=PRECISION) * (scale * LOG2E), SOFTCAP)  # [BN, BM]
            if not FULL:
                m_s = m_pair
                if MASK:
                    p_tiles = p_whole + (i_q + i_g) // sharing * tiles_q * tiles_k
                    if not whole(p_tiles, i_m, i_n * BN, tiles_q, tiles_k, BM, BN):
                        p_m = p_mask + i_g * s_mh + tl.cast(i_m, tl.int64) * s_mq
                        b_s, m_s = masked(b_s, p_m, o_t[None, :] * s_mq + b_pos[:, None] * s_mt, m_s, MASK, HIDDEN)
                    if COUNT >= 0:
                        b_seen = tl.maximum(b_seen, m_s.to(tl.float32))
                b_s = tl.where(m_s, b_s, float("-inf"))
            b_p = tl.exp2(b_s - b_lse[None, :])
            if DIRECT:
                b_sum += tl.sum(b_p, 1) * (1.0 / G)
            elif MEAN:
                b_a += b_p * (1.0 / G)
            else:
                b_a = tl.maximum(b_a, b_p)
        if not DIRECT:
            if SUM >= 0:
                b_sum += tl.sum(b_a, 1)
            if SUMSQ >= 0:
                b_square += tl.sum(b_a * b_a, 1)
        if COUNT >= 0:
            if FULL:
                b_count += BM
            elif MASK:
                b_count += tl.sum(b_seen, 1)
            else:
                b_count += tl.sum(m_pair.to(tl.float32), 1)
    return b_sum, b_square, b_count


@triton.jit(do_not_specialize=LOOSE)
def statistics_kernel(
    p_q, p_k, p_pos, p_mask, p_span, p_whole, p_tokens, p_bounds, p_lse, p_valid, p_start, p_end, p_stats,
    s_qb, s_qh, s_qs, s_kb, s_kh, s_kl, s_mb, s_mh, s_mq, s_mt, s_tb, s_bb,
    scale, position, S, L, HKV, spanning, sharing, tiles_q, tiles_k,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr, POS: tl.constexpr, MASK: tl.constexpr,
    HIDDEN: tl.constexpr, PRECISION: tl.constexpr, SOFTCAP: tl.constexpr, OBSERVED: tl.constexpr, MEAN: tl.constexpr,
    SUM: tl.constexpr, SUMSQ: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """stats [N, B, Hkv, L]: sums over observing queries i of a_ij, a_ij^2 and visibility; rows SUM, SUMSQ, COUNT or -1.

    a_ij = mean or max over the G heads of 2^(logit_ij - lse_i). Observing: all valid queries (OBSERVED -1), or the last
    OBSERVED of them, which begin at p_start[b]. Program: (b, KV head) x key block; the tile is transposed,
    [keys, queries], so that the sums over queries stay within a warp.
    """
    i_r, i_n = rows(0), tl.program_id(1)
    i_b, i_h = i_r // HKV, i_r % HKV
    o_n = i_n * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_n, m_d = o_n < L, o_d < D
    p_kn = p_k + i_b * s_kb + i_h * s_kh + tl.cast(i_n * BN, tl.int64) * s_kl
    p_kn += tl.arange(0, BN)[:, None] * s_kl + o_d[None, :]
    b_k = tl.load(p_kn, mask=m_n[:, None] & m_d[None, :], other=0.0)  # [BN, BD]
    if POS:
        p_pos += i_r * L
    b_pos, m_key = key_positions(p_pos, o_n, m_n, POS)
    left, right = i_n * BN, tl.minimum(i_n * BN + BN, L) - 1
    start, end, part = 0, S, 0
    if TOKENS:
        p_tokens += i_b * s_tb
        token, past, part = token_span(p_bounds + i_b * s_bb, position + S)
        m_key = by_tokens(m_key, p_tokens, b_pos, token, past, part)
        start, end = tl.maximum(token - position, 0), past - position
    if MASK:
        end = tl.minimum(end, tl.load(p_end + i_b))
    if OBSERVED > 0:
        if MASK or TOKENS:  # noqa: SIM108 triton decides it at compile time
            start = tl.load(p_start + i_b)
        else:
            start = tl.maximum(end - OBSERVED, 0)
    if POS:
        first, last, low, high = start, end, 0, 0
        own = left - (L - S)  # the last S keys are the call's own
        if CAUSAL == 1:
            first = tl.maximum(first, own)
        if CAUSAL == 2:
            first = tl.maximum(first, tl.where(own >= 0, own + position, 0))
    else:
        first, last, low, high = seeing_queries(left, right, position, start, end, CAUSAL, WINDOW, CHUNK)
        if TOKENS:
            high = tl.where((part != 0) | (left < token) | (right >= past), low, high)
            last = tl.where((right < token) | (left >= past), first, last)
    if MASK:
        i_span = i_b * spanning + i_h // (HKV // spanning)
        seen_from, seen_to = covered(p_span + i_span * tiles_k * 2, i_n * BN, tiles_k, S, BN)
        first, last, high = tl.maximum(first, seen_from), tl.minimum(last, seen_to), low
    first, low, high, last = parted(first, last, low, high, BM)
    i_q = i_h * G
    p_q += i_b * s_qb + i_q * s_qh
    p_lse += i_r * G * S
    if MASK or TOKENS:
        p_valid += i_b * S
    if MASK:
        p_whole += i_b * (HKV * G // sharing) * tiles_q * tiles_k
        p_mask += i_b * s_mb + i_q * s_mh
    b_sum = tl.zeros([BN], tl.float32)
    b_square = tl.zeros([BN], tl.float32)
    b_count = tl.zeros([BN], tl.float32)
    SPLIT: tl.constexpr = not (POS or MASK)
    if SPLIT:
        b_sum, b_square, b_count = observe_queries(
            b_k, b_sum, b_square, b_count, b_pos, m_key, first, low, start, end, i_n, i_q, p_q, p_mask, p_whole, p_lse,
            p_valid, s_qh, s_qs, s_mh, s_mq, s_mt, scale, position, S, sharing, tiles_q, tiles_k, G, D, BD, BM, BN,
            CAUSAL, WINDOW, CHUNK, TOKENS, MASK, HIDDEN, PRECISION, SOFTCAP, MEAN, SUM, SUMSQ, COUNT, False,
        )  # fmt: skip
        b_sum, b_square, b_count = observe_queries(
            b_k, b_sum, b_square, b_count, b_pos, m_key, low, high, start, end, i_n, i_q, p_q, p_mask, p_whole, p_lse,
            p_valid, s_qh, s_qs, s_mh, s_mq, s_mt, scale, position, S, sharing, tiles_q, tiles_k, G, D, BD, BM, BN,
            CAUSAL, WINDOW, CHUNK, TOKENS, MASK, HIDDEN, PRECISION, SOFTCAP, MEAN, SUM, SUMSQ, COUNT, True,
        )  # fmt: skip
        first = high
    b_sum, b_square, b_count = observe_queries(
        b_k, b_sum, b_square, b_count, b_pos, m_key, first, last, start, end, i_n, i_q, p_q, p_mask, p_whole, p_lse,
        p_valid, s_qh, s_qs, s_mh, s_mq, s_mt, scale, position, S, sharing, tiles_q, tiles_k, G, D, BD, BM, BN,
        CAUSAL, WINDOW, CHUNK, TOKENS, MASK, HIDDEN, PRECISION, SOFTCAP, MEAN, SUM, SUMSQ, COUNT, False,
    )  # fmt: skip
    plane = tl.num_programs(0).to(tl.int64) * L
    p_row = p_stats + i_r * L + o_n
    if SUM >= 0:
        tl.store(p_row + SUM * plane, b_sum, mask=m_n)
    if SUMSQ >= 0:
        tl.store(p_row + SUMSQ * plane, b_square, mask=m_n)
    if COUNT >= 0:
        tl.store(p_row + COUNT * plane, b_count, mask=m_n)
