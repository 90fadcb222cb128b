"""Device code of select_slots: one program per (b, KV head) finds the exact threshold, then emits indices in order."""

# mypy: ignore-errors

import triton
import triton.language as tl
from kvpass.kernels.triton_shared.triton_common import kth_key, rising, rows


@triton.jit(do_not_specialize=["L", "capacity"])
def select_kernel(p_score, p_cursor, p_idx, L, capacity, BLOCK: tl.constexpr):
    """score [R, L] float32, cursor [R, 4] -> idx [R, capacity]; R = B * Hkv programs.

    A key stays if its score is above the threshold, or equal to it while ties are left: lower indices come first.
    """
    i_r = rows(0)
    p_row = p_score + i_r * L
    p_out = p_idx + i_r * capacity
    live = tl.load(p_cursor + i_r * 4)
    sure, tied, ties = kth_key(p_row, L, live, BLOCK)
    kept = tl.full((), 0, tl.int32)
    passed = tl.full((), 0, tl.int32)
    for i in range(0, L, BLOCK):
        o_x = i + tl.arange(0, BLOCK)
        b_key = rising(tl.load(p_row + o_x, mask=o_x < L, other=0.0)).to(tl.int64)  # [BLOCK]
        m_sure = (b_key >= sure) & (o_x < L)
        m_tie = (b_key == tied) & (b_key < sure) & (o_x < L)
        b_rank = passed + tl.cumsum(m_tie.to(tl.int32), 0)  # 1 for the first tie of the row
        m_kept = m_sure | (m_tie & (b_rank <= ties))
        b_slot = kept + tl.cumsum(m_kept.to(tl.int32), 0) - 1
        tl.store(p_out + b_slot, o_x, mask=m_kept & (b_slot < capacity))
        kept += tl.sum(m_kept.to(tl.int32), 0)
        passed += tl.sum(m_tie.to(tl.int32), 0)
    for i in range(live, capacity, BLOCK):
        o_x = i + tl.arange(0, BLOCK)
        tl.store(p_out + o_x, tl.full([BLOCK], -1, tl.int32), mask=o_x < capacity)
