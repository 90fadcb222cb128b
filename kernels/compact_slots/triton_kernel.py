"""Device code of compact_slots: a gather, one program per (b, KV head) and block of slots."""

# mypy: ignore-errors

import triton
import triton.language as tl
from kvpass.kernels.triton_shared.triton_common import rows


@triton.jit
def gather_rows(p_x, s_l, b_idx, p_out, o_c, m_c, D: tl.constexpr, BD: tl.constexpr):
    """out[o_c] = x[b_idx] for the slots m_c. x rows have stride s_l, out rows D; b_idx, o_c, m_c are [BLOCK]."""
    o_d = tl.arange(0, BD)
    m_x = m_c[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + b_idx.to(tl.int64)[:, None] * s_l + o_d[None, :], mask=m_x)  # [BLOCK, BD]
    tl.store(p_out + o_c.to(tl.int64)[:, None] * D + o_d[None, :], b_x, mask=m_x)


@triton.jit(do_not_specialize=["L", "C", "capacity"])
def compact_kernel(
    p_k,
    p_v,
    p_pos,
    p_stats,
    p_idx,
    p_cursor,
    p_kout,
    p_vout,
    p_posout,
    p_statsout,
    p_cursorout,
    s_kb,
    s_kh,
    s_kl,
    s_vb,
    s_vh,
    s_vl,
    HKV,
    L,
    C,
    capacity,
    N: tl.constexpr,
    POS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """k [B, Hkv, L, D], v, pos [R, L] or None, stats [N, R, L], idx [R, capacity] -> the state, C slots; R = B * Hkv.

    Slots beyond LIVE get pos -1 and nothing else; the program of block 0 writes the cursor.
    """
    i_r, i_c = rows(0), tl.program_id(1)
    i_b, i_h = i_r // HKV, i_r % HKV
    plane = tl.num_programs(0).to(tl.int64)
    live = tl.load(p_cursor + i_r * 4)
    o_c = i_c * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_c = o_c < tl.minimum(live, capacity)
    b_idx = tl.load(p_idx + i_r * capacity + o_c, mask=m_c, other=0)
    b_pos = b_idx
    if POS:
        b_pos = tl.load(p_pos + i_r * L + b_idx, mask=m_c, other=-1)
    tl.store(p_posout + i_r * C + o_c, tl.where(m_c, b_pos, -1), mask=o_c < C)
    if i_c == 0:
        o_4 = tl.arange(0, 4)
        tl.store(p_cursorout + i_r * 4 + o_4, tl.load(p_cursor + i_r * 4 + o_4))
    if i_c * BLOCK < live:
        gather_rows(p_k + i_b * s_kb + i_h * s_kh, s_kl, b_idx, p_kout + i_r * C * D, o_c, m_c, D, BD)
        gather_rows(p_v + i_b * s_vb + i_h * s_vh, s_vl, b_idx, p_vout + i_r * C * DV, o_c, m_c, DV, BDV)
        for n in tl.static_range(N):
            b_x = tl.load(p_stats + (n * plane + i_r) * L + b_idx, mask=m_c)
            tl.store(p_statsout + (n * plane + i_r) * C + o_c, b_x, mask=m_c)
