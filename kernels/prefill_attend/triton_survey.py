"""Device code of prefill_attend: one look at the mask before attention.

A model's mask is a tensor even if it is causal, so nothing says statically which tiles are empty. The survey reads the
mask once and notes which tokens are valid, per tile of queries (keys) the span of tiles of keys (queries) that it can
see, and per pair of tiles whether it sees all. Attention and statistics then loop over spans, and read the mask only
where it shows a part of a tile.
"""

# mypy: ignore-errors

import triton
import triton.language as tl
from kvpass.kernels.triton_shared.triton_common import masked, rows

TILE = tl.constexpr(64)


@triton.jit
def covered(p_span, start, tiles, limit, SIZE: tl.constexpr):
    """First and one-past-last element that elements start .. start + SIZE can see; p_span [tiles, 2] of one row.

    A span is stored as (tiles of the other side - first tile, last tile + 1), both 0 if there is none, so that
    maxima merge spans and zeros initialise them.
    """
    o_t = start // TILE + tl.arange(0, (SIZE + TILE - 1) // TILE)
    b_first = tl.load(p_span + o_t * 2, mask=o_t < tiles, other=0)
    b_last = tl.load(p_span + o_t * 2 + 1, mask=o_t < tiles, other=0)
    first = tl.cdiv(limit, TILE) - tl.max(b_first, 0)
    return first * TILE, tl.minimum(tl.max(b_last, 0) * TILE, limit)


@triton.jit
def whole(p_whole, i_m, i_n, tiles_q, tiles_k, BM: tl.constexpr, BN: tl.constexpr):
    """Whether the mask shows queries i_m .. i_m + BM all of keys i_n .. i_n + BN, and adds nothing to their logits.

    p_whole: uint8 [tiles_q, tiles_k] of one head. A block that is smaller than a tile must lie in one.
    """
    o_q = i_m // TILE + tl.arange(0, (BM + TILE - 1) // TILE)[:, None]
    o_k = i_n // TILE + tl.arange(0, (BN + TILE - 1) // TILE)[None, :]
    b_w = tl.load(p_whole + o_q * tiles_k + o_k, mask=(o_q < tiles_q) & (o_k < tiles_k), other=1)
    return tl.min(tl.min(b_w.to(tl.int32), 1), 0) != 0


@triton.jit(do_not_specialize=["S", "L", "tiles_q", "tiles_k", "s_mb", "s_mh", "s_mq"])
def survey_kernel(
    p_mask,
    p_pos,
    p_valid,
    p_end,
    p_qspan,
    p_kspan,
    p_whole,
    s_mb,
    s_mh,
    s_mq,
    s_mt,
    S,
    L,
    H,
    HK,
    HKV,
    tiles_q,
    tiles_k,
    POS: tl.constexpr,
    MASK: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Mask -> valid [B, S] uint8, end [B] (one past the last valid token), spans of query and of key tiles, and which
    pairs of tiles are seen wholly, uint8 [B, H, tiles_q, tiles_k].

    Spans [B, H, tiles_q, 2] and [B, HK, tiles_k, 2]. The other outputs start at zero. Program: (b, surveyed head) x
    query tile x key tile. H: heads that can differ (1, Hkv or Hq); HK: their KV heads (1 or Hkv); the last S keys
    are the call's own tokens.
    """
    i_r, i_m, i_n = rows(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = i_r // H, i_r % H
    i_k = i_h // (H // HK)
    o_m = i_m * TILE + tl.arange(0, TILE)
    o_n = i_n * TILE + tl.arange(0, TILE)
    m_n = o_n < L
    b_pos = o_n
    if POS:
        b_pos = tl.load(p_pos + (i_b * HKV + i_k) * L + o_n, mask=m_n, other=-1)
        m_n = b_pos >= 0
    m_e = (o_m < S)[:, None] & m_n[None, :]
    p_mask += i_b * s_mb + i_h * s_mh + tl.cast(i_m * TILE, tl.int64) * s_mq
    o_mask = tl.arange(0, TILE)[:, None] * s_mq + b_pos[None, :] * s_mt
    b_s, m_s = masked(tl.zeros([TILE, TILE], tl.float32), p_mask, o_mask, m_e, MASK, HIDDEN)
    b_whole = tl.min(tl.min(((b_s == 0.0) | (m_e == 0)).to(tl.int32), 1), 0)
    tl.store(p_whole + ((i_b * H + i_h) * tiles_q + i_m) * tiles_k + i_n, b_whole.to(tl.uint8))
    b_seen = tl.max(m_s.to(tl.int32), 0)  # [TILE]
    if tl.max(b_seen, 0) > 0:
        p_row = p_qspan + ((i_b * H + i_h) * tiles_q + i_m) * 2
        tl.atomic_max(p_row, tiles_k - i_n)
        tl.atomic_max(p_row + 1, i_n + 1)
        p_column = p_kspan + ((i_b * HK + i_k) * tiles_k + i_n) * 2
        tl.atomic_max(p_column, tiles_q - i_m)
        tl.atomic_max(p_column + 1, i_m + 1)
        o_own = o_n - (L - S)
        m_own = (o_own >= 0) & (b_seen > 0)
        tl.store(p_valid + i_b * S + o_own, tl.full([TILE], 1, tl.uint8), mask=m_own)
        tl.atomic_max(p_end + i_b, tl.max(tl.where(m_own, o_own + 1, 0), 0))
