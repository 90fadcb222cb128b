"""Device code of prefill_attend: flash attention. The second pass is in `triton_statistics`."""

# mypy: ignore-errors

import triton
import triton.language as tl
from kvpass.kernels.triton_shared.triton_common import LOG2E, capped, finite, masked, rows, softmax_step

from .triton_survey import covered, whole
from .triton_visibility import LOOSE, by_tokens, by_words, key_positions, parted, seen_keys, token_span


@triton.jit
def attend_keys(
    b_q,
    b_o,
    b_max,
    b_sum,
    first,
    last,
    i_m,
    p_k,
    p_v,
    p_pos,
    p_mask,
    p_whole,
    p_tokens,
    s_kl,
    s_vl,
    s_mq,
    s_mt,
    scale,
    position,
    S,
    L,
    tiles_q,
    tiles_k,
    token,
    end,
    holes,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    POS: tl.constexpr,
    MASK: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FULL: tl.constexpr,
):
    """Add keys first .. last to the online softmax of a block of queries b_q [BM, BD]: (out, maximum, sum) so far.

    FULL: all of these keys exist and are seen by all queries. first and last are then multiples of BN.
    """
    o_t, o_d, o_v = tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    o_i = tl.arange(0, BM)
    for i_n in range(first, last, BN):
        o_n = i_n + o_t
        m_n = o_n < L
        p_kn = p_k + tl.cast(i_n, tl.int64) * s_kl + (o_t[None, :] * s_kl + o_d[:, None])
        if FULL and D == BD:  # noqa: SIM108 triton decides it at compile time
            b_k = tl.load(p_kn)  # [BD, BN]
        else:
            b_k = tl.load(p_kn, mask=m_n[None, :] & (o_d < D)[:, None], other=0.0)
        b_s = capped(tl.dot(b_q, b_k, input_precision=PRECISION) * (scale * LOG2E), SOFTCAP)  # [BM, BN]
        if not FULL:
            b_pos, m_key = key_positions(p_pos, o_n, m_n, POS)
            if TOKENS:
                m_key = by_tokens(m_key, p_tokens, b_pos, token, end, holes)
            o_m = i_m * BM + o_i
            m_s = by_words(
                (o_m < S)[:, None] & m_key[None, :], b_pos[None, :], o_m[:, None], position, CAUSAL, WINDOW, CHUNK
            )
            if MASK:  # noqa: SIM102 triton decides it at compile time
                if not whole(p_whole, i_m * BM, i_n, tiles_q, tiles_k, BM, BN):
                    o_mask = o_i[:, None] * s_mq + b_pos[None, :] * s_mt
                    b_s, m_s = masked(b_s, p_mask, o_mask, m_s, MASK, HIDDEN)
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_p, b_max, b_sum, b_f = softmax_step(b_s, b_max, b_sum)
        p_vn = p_v + tl.cast(i_n, tl.int64) * s_vl + (o_t[:, None] * s_vl + o_v[None, :])
        if FULL and DV == BDV:  # noqa: SIM108 triton decides it at compile time
            b_v = tl.load(p_vn)  # [BN, BDV]
        else:
            b_v = tl.load(p_vn, mask=m_n[:, None] & (o_v < DV)[None, :], other=0.0)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_f[:, None], input_precision=PRECISION)  # [BM, BDV]
    return b_o, b_max, b_sum


@triton.jit(do_not_specialize=LOOSE)
def attend_kernel(
    p_q, p_k, p_v, p_pos, p_mask, p_span, p_whole, p_tokens, p_bounds, p_sinks, p_mean, p_out, p_lse,
    s_qb, s_qh, s_qs, s_kb, s_kh, s_kl, s_vb, s_vh, s_vl, s_mb, s_mh, s_mq, s_mt, s_tb, s_bb, s_ob, s_oh, s_os,
    scale, position, S, L, HQ, G, spanning, tiles_q, tiles_k,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr, POS: tl.constexpr,
    MASK: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr,
    MEND: tl.constexpr, SPLIT: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """out [B, Hq, S, Dv] = softmax(q k^T scale + mask) v; lse [B, Hq, S], natural, +inf (or the sink) if blind.

    Program: (b, query head) x query block, the longest blocks first. p_span [B, spanning, tiles_q, 2]: which key tiles
    a query tile can see by the mask; p_whole [B, spanning, tiles_q, tiles_k]: which of them it sees all of.
    MEND: out and lse are right already where a row's tokens are not the matter. SPLIT: blocks of keys that all queries
    see go without comparisons. MEAN: a query that sees nothing gets p_mean [B, Hkv, Dv], else zeros.
    """
    i_r, i_m = rows(0), tl.num_programs(1) - 1 - tl.program_id(1)
    i_b, i_h = i_r // HQ, i_r % HQ
    i_kv = i_h // G
    o_i, o_d, o_v = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BDV)
    o_m = i_m * BM + o_i
    m_m, m_d, m_v = o_m < S, o_d < D, o_v < DV
    top, bottom = i_m * BM, tl.minimum(i_m * BM + BM, S) - 1
    token, end, holes = 0, L, 0
    if TOKENS:
        p_tokens += i_b * s_tb
        token, end, holes = token_span(p_bounds + i_b * s_bb, L if not POS else position + S)
    if POS:
        first, last, low, high = 0, L, 0, 0
        p_pos += (i_b * (HQ // G) + i_kv) * L
        if CAUSAL == 1:  # the last S keys are the call's own
            last = L - S + bottom + 1
        if CAUSAL == 2:
            last = tl.minimum(L - S + tl.maximum(bottom + 1 - position, 0), L)
    else:
        first, last, low, high = seen_keys(top, bottom, position, token, end, CAUSAL, WINDOW, CHUNK)
        if TOKENS:
            high = tl.where(holes != 0, low, high)
    if MEND:
        done = (token == 0) & (holes == 0) & (end > bottom if CAUSAL > 0 else end == S)
        m_m = o_m < tl.where(done, 0, S)
        last = tl.where(done, 0, last)
    if MASK:
        i_span = i_b * spanning + i_h // (HQ // spanning)
        left, right = covered(p_span + i_span * tiles_q * 2, i_m * BM, tiles_q, L, BM)
        first, last, high = tl.maximum(first, left), tl.minimum(last, right), low
        p_whole += i_span * tiles_q * tiles_k
        p_mask += i_b * s_mb + i_h * s_mh + tl.cast(i_m * BM, tl.int64) * s_mq
    first, low, high, last = parted(first, last, low, high, BN)
    p_k += i_b * s_kb + i_kv * s_kh
    p_v += i_b * s_vb + i_kv * s_vh
    p_qm = p_q + i_b * s_qb + i_h * s_qh + tl.cast(i_m * BM, tl.int64) * s_qs + (o_i[:, None] * s_qs + o_d[None, :])
    b_q = tl.load(p_qm, mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BM, BD]
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    if SINKS:  # as if a key had been seen whose value is zero
        b_max = tl.zeros([BM], tl.float32) + tl.load(p_sinks + i_h).to(tl.float32) * LOG2E
        b_sum += 1.0
    b_o = tl.zeros([BM, BDV], tl.float32)
    if SPLIT and not (POS or MASK):
        if WINDOW > 0 or CHUNK > 0 or TOKENS:
            b_o, b_max, b_sum = attend_keys(
                b_q, b_o, b_max, b_sum, first, low, i_m, p_k, p_v, p_pos, p_mask, p_whole, p_tokens, s_kl, s_vl, s_mq,
                s_mt, scale, position, S, L, tiles_q, tiles_k, token, end, holes, D, DV, BD, BDV, BM, BN, CAUSAL,
                WINDOW, CHUNK, TOKENS, POS, MASK, HIDDEN, PRECISION, SOFTCAP, False,
            )  # fmt: skip
        b_o, b_max, b_sum = attend_keys(
            b_q, b_o, b_max, b_sum, low, high, i_m, p_k, p_v, p_pos, p_mask, p_whole, p_tokens, s_kl, s_vl, s_mq,
            s_mt, scale, position, S, L, tiles_q, tiles_k, token, end, holes, D, DV, BD, BDV, BM, BN, CAUSAL, WINDOW,
            CHUNK, TOKENS, POS, MASK, HIDDEN, PRECISION, SOFTCAP, True,
        )  # fmt: skip
        first = high
    b_o, b_max, b_sum = attend_keys(
        b_q, b_o, b_max, b_sum, first, last, i_m, p_k, p_v, p_pos, p_mask, p_whole, p_tokens, s_kl, s_vl, s_mq,
        s_mt, scale, position, S, L, tiles_q, tiles_k, token, end, holes, D, DV, BD, BDV, BM, BN, CAUSAL, WINDOW,
        CHUNK, TOKENS, POS, MASK, HIDDEN, PRECISION, SOFTCAP, False,
    )  # fmt: skip
    m_blind = b_sum == 0.0
    b_o = b_o / tl.where(m_blind, 1.0, b_sum)[:, None]
    if MEAN:
        b_mean = tl.load(p_mean + (i_b * (HQ // G) + i_kv) * DV + o_v, mask=m_v, other=0.0)
        b_o = tl.where(m_blind[:, None], b_mean[None, :], b_o)
    p_om = p_out + i_b * s_ob + i_h * s_oh + tl.cast(i_m * BM, tl.int64) * s_os + (o_i[:, None] * s_os + o_v[None, :])
    tl.store(p_om, b_o.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_v[None, :])
    b_lse = (finite(b_max) + tl.log2(tl.where(m_blind, 1.0, b_sum))) * (1.0 / LOG2E)
    tl.store(p_lse + i_r * S + o_m, tl.where(m_blind, float("inf"), b_lse), mask=m_m)
