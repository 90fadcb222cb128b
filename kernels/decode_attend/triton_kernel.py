"""Device code of decode_attend, first kernel: append the token, attend over splits of the slots.

The new token never passes through memory within a launch: split 0 takes it from its own registers and writes it to slot
FREE, which no program of that launch reads. Its codes, where slots hold such, are in that slot already, and p_knew and
p_vnew are what attention reads of it.
"""

# mypy: ignore-errors

import triton
import triton.language as tl
from kvpass.kernels.triton_shared.triton_common import LOG2E, capped, masked, rows, softmax_step

from .triton_codes import spread, tile
from .triton_row import now, partials, shown, sight, slot_zero


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


@triton.jit
def begin(p_stats, p_arrive, i_r, place, plane, N: tl.constexpr, ARRIVE: tl.constexpr):
    """What the statistics of the token's slot are before its query adds to them. p_arrive: [N, rows]."""
    for n in tl.static_range(N):
        value = 0.0
        if ARRIVE:
            value = tl.load(p_arrive + n * tl.num_programs(0) + i_r)
        tl.store(p_stats + n * plane + place, value)


@triton.jit(do_not_specialize=["position", "C", "splits", "s_mb", "s_mh", "s_mt", "s_nb", "s_tb"])
def split_kernel(
    p_q, p_knew, p_vnew, p_arrive, p_mask, p_tokens, p_bounds, p_at, p_k, p_v, p_pos, p_stats, p_cursor, p_scratch,
    p_whole, p_place, p_kcodes, p_kscale, p_klow, p_vcodes, p_vscale, p_vlow, s_qb, s_qh, s_kb, s_kh, s_vb, s_vh, s_mb,
    s_mh, s_mt, s_nb, s_tb, mask_heads, scale, position, C, HKV, splits,
    G: tl.constexpr, GP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BDV: tl.constexpr, BN: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    LOGITS: tl.constexpr, COUNTED: tl.constexpr, ARRIVE: tl.constexpr, AT: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, TOKENS: tl.constexpr, MASK: tl.constexpr, HIDDEN: tl.constexpr, SOFTCAP: tl.constexpr,
    COPIES: tl.constexpr, K_AS: tl.constexpr, K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_EACH: tl.constexpr,
    V_AS: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_EACH: tl.constexpr,
):  # fmt: skip
    """Append the token; per split: maximum, sum [B, Hkv, G, splits], raw output [B, Hkv, G, splits, Dv]; logits
    [G, rows * C]; COUNTED: how many slots some query of the group sees.

    Program: (b, KV head) x split, so K and V are read once per KV head, whatever the group. G heads padded to GP.
    Logits are in base 2, -inf where hidden. An empty split writes no output. Program 0 of a row clears its counter.
    """
    i_r, i_s = rows(0), tl.program_id(1)
    i_b, i_h = i_r // HKV, i_r % HKV
    plane = tl.num_programs(0).to(tl.int64) * C
    p_acc, p_max, p_sum, p_logits = partials(p_scratch, C, splits, G, DV)
    position = now(p_at, position, AT)
    zero = slot_zero(p_cursor, i_r, C, COLUMNS)
    p_cursor += i_r * COLUMNS
    live, free = tl.load(p_cursor), tl.load(p_cursor + 1)
    arrived, low, far, asks = sight(
        p_mask, p_bounds, p_cursor + 3, i_b, position, mask_heads, s_mb, s_mh, s_mt, s_nb,
        WINDOW, CHUNK, TOKENS, HEADS, MASK, HIDDEN,
    )  # fmt: skip
    if TOKENS:
        p_tokens += i_b * s_tb
    p_pos += zero
    o_g, o_t, o_d, o_v = tl.arange(0, GP), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    m_g, m_d, m_v = o_g < G, o_d < D, o_v < DV
    if K_GROUP < K_EACH:
        o_d, m_d = spread(o_d, D, K_GROUP, K_EACH)
    if V_GROUP < V_EACH:
        o_v, m_v = spread(o_v, DV, V_GROUP, V_EACH)
    p_qg = p_q + i_b * s_qb + (i_h * G + o_g)[:, None] * s_qh + o_d[None, :]
    b_q = tl.load(p_qg, mask=m_g[:, None] & m_d[None, :], other=0.0)  # [GP, BD]
    o_mask = i_b * s_mb + (i_h * G + o_g).to(tl.int64) * s_mh
    p_logits += o_g * plane + zero  # [GP]
    p_k += zero * D if K_AS == "dense" else i_r * (COPIES * D)
    p_v += zero * DV if V_AS == "dense" else i_r * (COPIES * DV)

    mine = tl.where(i_s == 0, arrived, 0)  # this program appends the token
    m_new = tl.where(m_g, mine, 0) > 0
    b_knew = tl.load(p_knew + i_b * s_kb + i_h * s_kh + o_d, mask=m_d, other=0.0)
    b_vnew = tl.load(p_vnew + i_b * s_vb + i_h * s_vh + o_v, mask=m_v, other=0.0)
    b_own = tl.sum(b_q.to(tl.float32) * b_knew.to(tl.float32)[None, :], 1) * (scale * LOG2E)  # [GP]
    b_own = capped(b_own, SOFTCAP)
    b_max, m_seen = masked(b_own, p_mask, o_mask + tl.cast(position, tl.int64) * s_mt, m_new, MASK, HIDDEN)
    b_sum = m_seen.to(tl.float32)
    count = tl.max(m_seen.to(tl.int32), 0)
    b_o = b_sum[:, None] * b_vnew.to(tl.float32)[None, :]  # [GP, BDV]
    if i_s == 0:
        tl.store(p_whole + i_r, 0)
    if mine > 0:
        if K_AS == "dense":
            tl.store(p_k + free.to(tl.int64) * D + o_d, b_knew, mask=m_d)
        if V_AS == "dense":
            tl.store(p_v + free.to(tl.int64) * DV + o_v, b_vnew, mask=m_v)
        tl.store(p_pos + free, position)
        begin(p_stats, p_arrive, i_r, zero + free, plane, N, ARRIVE)
        if LOGITS:
            tl.store(p_logits + free, b_max, mask=m_g)

    first, last = split_range(live, splits, BN)
    for i_n in range(first, last, BN):
        o_n = i_n + o_t
        m_n = (o_n < last) & (o_n != free)
        b_k = tile(
            p_k, p_kcodes, p_kscale, p_klow, p_place, zero, i_n, o_t, m_n, o_d, m_d,
            D, BD, K_AS, K_BITS, K_GROUP, K_EACH, COPIES,
        )  # fmt: skip
        b_v = tile(
            p_v, p_vcodes, p_vscale, p_vlow, p_place, zero, i_n, o_t, m_n, o_v, m_v,
            DV, BDV, V_AS, V_BITS, V_GROUP, V_EACH, COPIES,
        )  # fmt: skip
        b_s = capped(products(b_q, b_k, GP == 1, PRECISION) * (scale * LOG2E), SOFTCAP)  # [GP, BN]
        o_seen = o_mask[:, None]
        if MASK:
            b_pos = tl.load(p_pos + o_n, mask=m_n, other=0)
            o_seen = o_seen + b_pos.to(tl.int64)[None, :] * s_mt
        m_s = shown(p_pos, p_tokens, o_n, m_n, low, far, asks, WINDOW + CHUNK > 0, TOKENS)
        b_s, m_s = masked(b_s, p_mask, o_seen, m_g[:, None] & m_s[None, :], MASK, HIDDEN)
        if LOGITS:
            tl.store(p_logits[:, None] + o_n[None, :], b_s, mask=m_g[:, None] & m_n[None, :])
        if COUNTED:
            count += tl.sum(tl.max(m_s.to(tl.int32), 0), 0)
        b_p, b_max, b_sum, b_f = softmax_step(b_s, b_max, b_sum)
        b_o = b_o * b_f[:, None] + mixed(b_p, b_v, GP == 1, PRECISION)
    o_part = (i_r * G + o_g) * splits + i_s
    tl.store(p_max + o_part, b_max, mask=m_g)
    tl.store(p_sum + o_part, b_sum, mask=m_g)
    m_o = (m_g & (b_sum > 0.0))[:, None] & m_v[None, :]
    tl.store(p_acc + o_part[:, None] * DV + o_v[None, :], b_o, mask=m_o)
    if COUNTED:
        tl.store(p_whole + tl.num_programs(0) + i_r * splits + i_s, count)
