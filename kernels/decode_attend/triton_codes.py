"""Device code of decode_attend: a tile of keys or values, whatever slots hold. Codes are loaded as they are packed and
become numbers in registers; tokens that have a whole copy are read from it.

Columns of a coded tile are groups of EACH, a power of two: entry e of group g is column g * EACH + e, those from GROUP
on are none. Where GROUP is EACH, columns are entries.
"""

# mypy: ignore-errors

import triton
import triton.language as tl
from kvpass.kernels.codecs.normal import POSITIVE
from kvpass.kernels.triton_shared.triton_common import rows

from .triton_row import slot_zero

LEVELS = tl.constexpr((*POSITIVE[2], *POSITIVE[3], *POSITIVE[4]))


@triton.jit
def spread(o_x, WIDTH: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr):
    """The entry of each column, and whether it is one."""
    e = o_x % EACH
    o_entry = o_x // EACH * GROUP + e
    return o_entry, (e < GROUP) & (o_entry < WIDTH)


@triton.jit
def run_of(p_row, o_x, m_x, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """BITS of each code, int32, from a run of `kvpass.kernels.codecs.packing`: byte j of n holds codes j, j + n, .. .
    p_row: of the first byte. Lanes whose codes share a byte load it together: it leaves the memory once.
    """
    SIZE: tl.constexpr = (WIDTH * BITS + 7) // 8
    b_x = tl.load(p_row + o_x % SIZE, mask=m_x, other=0).to(tl.int32)
    return (b_x >> (o_x // SIZE * BITS)) & ((1 << BITS) - 1)


@triton.jit
def codes_of(p_row, o_x, m_x, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Codes of entries o_x of vectors whose first byte is at p_row: int32."""
    if BITS == 3:  # a run of 2 bits and one of 1
        b_high = run_of(p_row + (WIDTH * 2 + 7) // 8, o_x, m_x, WIDTH, 1)
        b_x = run_of(p_row, o_x, m_x, WIDTH, 2) | (b_high << 2)
    else:
        b_x = run_of(p_row, o_x, m_x, WIDTH, BITS)
    return b_x


@triton.jit
def number_of(b_x, AS: tl.constexpr, BITS: tl.constexpr):
    """What codes stand for before their scale, float32. Formats of 8 bits are the upper bits of a float16 (e4m3 with
    another bias), so no target needs to know them.
    """
    if AS == "e5m2":
        b_number = (b_x << 8).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    elif AS == "e4m3":
        b_half = ((b_x & 0x80) << 8) | ((b_x & 0x7F) << 7)
        b_number = b_half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    elif AS == "middle":
        b_number = (b_x - ((1 << (BITS - 1)) - 1)).to(tl.float32)
    elif AS == "normal":
        HALF: tl.constexpr = 1 << (BITS - 1)
        b_step = tl.where(b_x < HALF, HALF - 1 - b_x, b_x - HALF)
        b_number = tl.zeros_like(b_x).to(tl.float32)
        for i in tl.static_range(HALF):
            b_number = tl.where(b_step == i, LEVELS[HALF - 2 + i], b_number)
        b_number = tl.where(b_x < HALF, -b_number, b_number)
    else:
        b_number = b_x.to(tl.float32)
    return b_number


@triton.jit
def decoded(
    p_codes, p_scale, p_low, first, o_t, m_n, WIDTH: tl.constexpr, BX: tl.constexpr, AS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """float32 [BN, BX]: the vectors in slots first + o_t that exist (m_n). Scales are loaded once a group."""
    BYTES: tl.constexpr = (WIDTH * 2 + 7) // 8 + (WIDTH + 7) // 8 if BITS == 3 else (WIDTH * BITS + 7) // 8
    GROUPS: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    o_g, o_e = tl.arange(0, BX // EACH), tl.arange(0, EACH)
    o_x = (o_g[:, None] * GROUP + o_e[None, :])[None, :, :]  # [1, groups, EACH]
    m_x = m_n[:, None, None] & (o_e < GROUP)[None, None, :] & (o_x < WIDTH)
    b_x = codes_of(p_codes + first * BYTES + (o_t * BYTES)[:, None, None], o_x, m_x, WIDTH, BITS)
    b_x = number_of(b_x, AS, BITS)  # [BN, groups, EACH]
    o_scale, m_scale = o_t[:, None] * GROUPS + o_g[None, :], m_n[:, None] & (o_g < GROUPS)[None, :]
    b_scale = tl.load(p_scale + first * GROUPS + o_scale, mask=m_scale, other=0.0)
    b_x = b_x * b_scale.to(tl.float32)[:, :, None]
    if AS == "low":
        b_low = tl.load(p_low + first * GROUPS + o_scale, mask=m_scale, other=0.0)
        b_x = b_x + b_low.to(tl.float32)[:, :, None]
    return tl.reshape(b_x, [o_t.shape[0], BX])


@triton.jit
def tile(
    p_x, p_codes, p_scale, p_low, p_place, zero, i_n, o_t, m_n, o_x, m_x, WIDTH: tl.constexpr, BX: tl.constexpr,
    AS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Keys or values [BN, BX] of a row's slots i_n + o_t that exist (m_n), in the dtype of p_x. zero: place of its slot
    0. p_x: its dense slots, or its COPIES copies; p_place: which copy the token of each place has, -1: none.
    """
    if AS == "dense":
        p_n = p_x + tl.cast(i_n, tl.int64) * WIDTH + (o_t[:, None] * WIDTH + o_x[None, :])
        b_x = tl.load(p_n, mask=m_n[:, None] & m_x[None, :], other=0.0)
    else:
        first = zero + i_n
        b_x = decoded(p_codes, p_scale, p_low, first, o_t, m_n, WIDTH, BX, AS, BITS, GROUP, EACH)
        b_x = b_x.to(p_x.dtype.element_ty)
        if COPIES > 0:
            b_place = tl.load(p_place + first + o_t, mask=m_n, other=-1)[:, None]
            b_whole = tl.load(p_x + (b_place * WIDTH + o_x[None, :]), mask=(b_place >= 0) & m_x[None, :], other=0.0)
            b_x = tl.where(b_place >= 0, b_whole, b_x)
    return b_x


@triton.jit(do_not_specialize=["C"])
def places_kernel(
    p_pos, p_at, p_cursor, p_place, C, COLUMNS: tl.constexpr, COPIES: tl.constexpr, BE: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    """The place of each slot's whole copy, int32 [rows * C], -1: it has none. p_at: int32 [rows, COPIES], the positions
    that places hold. Program: (b, KV head) x share of the slots in use, in blocks of BE.
    """
    i_r = rows(0)
    zero, live = slot_zero(p_cursor, i_r, C, COLUMNS), tl.load(p_cursor + i_r * COLUMNS)
    p_at += i_r * COPIES
    for i in range(tl.program_id(1) * BE, live + 1, tl.num_programs(1) * BE):
        o_n = i + tl.arange(0, BE)
        b_pos = tl.load(p_pos + zero + o_n, mask=o_n <= live, other=-1)[:, None]
        b_place = tl.full([BE], -1, tl.int32)
        for w in range(0, COPIES, BW):
            o_w = w + tl.arange(0, BW)
            b_at = tl.load(p_at + o_w, mask=o_w < COPIES, other=-1)[None, :]
            m_here = (b_pos == b_at) & (b_at >= 0)
            b_place = tl.maximum(b_place, tl.max(tl.where(m_here, o_w[None, :], -1), 1))
        tl.store(p_place + zero + o_n, b_place, mask=o_n <= live)
