"""Codecs against plain Python: codes, scales, lowest values and their layout in memory, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kvpass.kernels.codecs.codec import Codec
from kvpass.kernels.codecs.hadamard import block_of, rotated
from kvpass.kernels.codecs.packing import pack, packed_size, unpack
from kvpass.kernels.codecs.registry import CODECS
from oracle import codes
from torch import Tensor

INF, NAN = math.inf, math.nan
WIDTHS = [64, 80, 96, 5, 1]
GROUPS = [64, 32, 16, 7, 1, 500]


def same(got: Tensor, want: list[Any]) -> bool:
    """Numbers equal, NaN where NaN is."""
    return torch.equal(got.double().nan_to_num(nan=12345.0), torch.tensor(want).double().nan_to_num(nan=12345.0))


def agree(codec: Codec, x: Tensor, group: int) -> None:
    """All parts of vectors [n, width], and what they are read back as."""
    parts = codec.encode(x, group)
    back = codec.decode(parts, x.shape[-1], group)
    shapes = codec.parts(x.shape[-1], group)
    assert [(part.shape[-1], part.dtype) for part in parts] == [(one.size, one.dtype) for one in shapes]
    assert back.dtype is torch.float32
    for at, row in enumerate(x.float().tolist()):
        want = codes.encoded(row, codec.name, group)
        assert same(back[at], codes.decoded(want, codec.name, group))
        found = dict(zip([one.name for one in shapes], parts, strict=True))
        for name in ("scale", "low"):
            assert (name in found) == (name in want), name
            assert name not in want or same(found[name][at], want[name])
        if None not in want["codes"]:  # what the codes of a NaN are means nothing: its scale says it
            assert same(found["codes"][at], codes.in_memory(want["codes"], codec.name))


def random(width: int, seed: int = 0) -> Tensor:
    """Rows of many sizes, with an offset or without, and one of outliers."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(8, width, generator=g)
    x = x * torch.tensor([1, 0.01, 30, 4000, 1e-3, 1, 1, 1.0])[:, None]
    x[5] += 7
    x[6] = x[6].round()
    x[7, 0] = 90
    return x


def test_these_are_all() -> None:
    assert tuple(CODECS) == (*codes.NAMES, "csr8", "csr4")  # which tests/kernels/test_sparse.py has
    assert all(codec.name == name for name, codec in CODECS.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", codes.NAMES)
def test_every_width_and_group(name: str, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        for group in GROUPS if dtype is torch.float32 else [32]:
            agree(CODECS[name], random(width, group).to(dtype), group)


@pytest.mark.parametrize("name", codes.NAMES)
@pytest.mark.parametrize(
    "row",
    [
        [0.0] * 6,
        [-0.0, 0.0, 0.0],
        [3.25] * 5,
        [1000.3] * 5,
        [-1000.3, -1000.3],
        [1e6, -1e6, 5.0],
        [1e6] * 4,
        [INF, 0.0, 1.0, -3.0],
        [-INF, 2.0],
        [INF, -INF, 0.0],
        [1e-7, -1e-7, 3e-8],
        [1e-9, 2e-9],
        [65504.0, 0.0],
        [2.0**-24, 2.0**-14],
        [0.5, 1.5, 2.5, 3.5, 0.0, 255.0, 15.0, 3.0],
    ],
    ids=str,
)
def test_rows_at_the_edge(name: str, row: list[float]) -> None:
    for group in (64, 2):
        agree(CODECS[name], torch.tensor([row, row[::-1]]), group)


@pytest.mark.parametrize("name", codes.NAMES)
def test_a_nan_spoils_its_group_alone(name: str) -> None:
    x = random(96)
    x[:, 40] = NAN
    agree(CODECS[name], x, 32)
    back = CODECS[name].decode(CODECS[name].encode(x, 32), 96, 32)
    first, end = {"float16": (40, 41), "mixed_2_1": (32, 48)}.get(name, (32, 64))
    assert back[:, first:end].isnan().all()
    assert not back[:, [*range(first), *range(end, 96)]].isnan().any()


@pytest.mark.parametrize("name", codes.FLOATS)
def test_all_bytes_of_an_eight_bit_format(name: str) -> None:
    """The oracle reads every byte as torch does, and writes what it read."""
    dtype = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[name]
    theirs = torch.arange(256, dtype=torch.uint8).view(dtype).float().tolist()
    for byte, number in enumerate(theirs):
        if math.isfinite(number):
            assert codes.number_of(byte, name) == number
            assert codes.eight_bits(number, name) == byte


def test_hand_vectors() -> None:
    """policies-2.md: S5.1, S5.4, S6; the scale is what float16 makes of it."""
    for name, row, codes_of_it, scale in [
        ("int2", [-1.0, 0, 1, 2], [0, 1, 2, 3], 1.0),
        ("int2", [0, 0.4, 0.9, 1.7], [0, 1, 2, 3], 0.566667),
        ("int4", [0.0, 1, 2, 7], [0, 2, 4, 15], 0.466667),
        ("int2", [0.5, 4, 1, 2.5], [0, 3, 0, 2], 1.166667),
    ]:
        codec, x = CODECS[name], torch.tensor([row])
        held, step, low = codec.encode(x, 4)
        assert unpack(held, codes.bits_of(name), 4).tolist() == [codes_of_it]
        torch.testing.assert_close(step.float(), torch.tensor([[scale]]), rtol=2**-11, atol=0)
        want = torch.tensor([[row[0] + scale * code for code in codes_of_it]])
        torch.testing.assert_close(codec.decode((held, step, low), 4, 4), want, rtol=2**-10, atol=0)


def test_the_norm_is_held() -> None:
    """policies-2.md, S5.4: k = [3, 0, 4, 0], rotated [.7, .7, -.1, -.1] of its norm, has its norm of 5 again."""
    codec, x = CODECS["turbo2"], torch.tensor([[3.0, 0, 4, 0]])
    held, scale = codec.encode(rotated(x), 64)
    assert unpack(held, 2, 4).tolist() == [[3, 3, 1, 1]]
    back = rotated(codec.decode((held, scale), 4, 64))
    torch.testing.assert_close(back, torch.tensor([[2.3713, 0, 4.4019, 0]]), rtol=1e-3, atol=1e-3)
    far = torch.randn(50, 64) * 20
    for bits in (2, 3, 4):
        codec = CODECS[f"turbo{bits}"]
        again = codec.decode(codec.encode(far, 64), 64, 64)
        torch.testing.assert_close(again.norm(dim=-1), far.norm(dim=-1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 8, 64, 80, 96])
def test_packing(bits: int, width: int) -> None:
    x = torch.randint(2**bits, (3, 2, width), generator=torch.Generator().manual_seed(width), dtype=torch.uint8)
    held = pack(x, bits)
    assert held.dtype is torch.uint8
    assert held.shape[-1] == packed_size(width, bits) >= math.ceil(width * bits / 8)
    assert held.flatten(0, 1).tolist() == [codes.packed(row, bits) for row in x.flatten(0, 1).tolist()]
    assert torch.equal(unpack(held, bits, width), x.float())


@pytest.mark.parametrize(
    ("name", "width", "group", "count"),
    [
        ("int8", 64, 64, 64 + 4),
        ("int8", 80, 64, 80 + 2 * 4),
        ("int4", 64, 64, 32 + 4),
        ("int4", 128, 64, 72),  # S5.8: 4.5 bits a value
        ("int2", 128, 32, 48),  # S5.8: 3 bits
        ("int4", 5, 64, 3 + 4),
        ("int2", 5, 2, 2 + 3 * 4),
        ("int8_symmetric", 96, 64, 96 + 2 * 2),
        ("int4_symmetric", 96, 32, 48 + 3 * 2),
        ("fp8_e4m3", 80, 80, 80 + 2),
        ("fp8_e5m2", 5, 1, 5 + 5 * 2),
    ],
)
def test_bytes(name: str, width: int, group: int, count: int) -> None:
    codec = CODECS[name]
    assert codec.bytes(width, group) == count
    assert sum(part.nbytes for part in codec.encode(torch.randn(1, width), group)) == count


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("int8", 0.006),
        ("int4", 0.1),
        ("int2", 0.48),
        ("int8_symmetric", 0.007),
        ("int4_symmetric", 0.12),
        ("fp8_e4m3", 0.03),
        ("fp8_e5m2", 0.06),
    ],
)
@pytest.mark.parametrize("size", [10.0, 1.0, 0.05, 0.005, 0.001])
def test_what_is_lost_does_not_depend_on_how_large_entries_are(name: str, error: float, size: float) -> None:
    """Of normal entries, 64 to a scale: the error relative to them."""
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    x = x / x.abs().amax(-1, keepdim=True) * size
    back = CODECS[name].decode(CODECS[name].encode(x, 64), 64, 64)
    assert (back - x).norm() <= error * x.norm()


def test_rotation_of_two() -> None:
    """policies-2.md, S5.3: logits are what they were."""
    q, k = torch.tensor([1.0, 3]), torch.tensor([2.0, 0])
    torch.testing.assert_close(rotated(q), torch.tensor([2.828427, -1.414214]))
    torch.testing.assert_close(rotated(k), torch.tensor([1.414214, 1.414214]))
    torch.testing.assert_close(rotated(q) @ rotated(k), torch.tensor(2.0))


@pytest.mark.parametrize("codec", [CODECS[name] for name in codes.NAMES], ids=lambda codec: codec.name)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.some(140)
def test_products_with_codes_are_products_with_what_they_stand_for(codec: Codec, width: int, group: int) -> None:
    g = torch.Generator().manual_seed(width)
    x, queries = torch.randn(3, 40, width, generator=g) * 3 + 1, torch.randn(3, 2, width, generator=g)
    weights, parts = torch.rand(3, 2, 40, generator=g).softmax(-1), codec.encode(x, group)
    read = torch.tensor([[codes.decoded(codes.encoded(row, codec.name, group), codec.name, group) for row in head]
                         for head in x.tolist()]).double()  # fmt: skip
    wanted = queries.double() @ read.mT
    torch.testing.assert_close(codec.products(queries, parts, group).double(), wanted, rtol=1e-5, atol=1e-4)
    mixed = codec.mixed(weights, parts, width, group).double()
    torch.testing.assert_close(mixed, weights.double() @ read, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("width", "block"), [(64, 64), (80, 16), (96, 32), (128, 128), (5, 1), (6, 2), (1, 1)])
def test_rotation_is_orthonormal_and_undoes_itself(width: int, block: int) -> None:
    assert block_of(width) == block
    turn = rotated(torch.eye(width))
    torch.testing.assert_close(turn.double(), codes.hadamard(width), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(turn @ turn.T, torch.eye(width))
    x = torch.randn(3, 2, width)
    torch.testing.assert_close(rotated(x).double(), x.double() @ codes.hadamard(width), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rotated(rotated(x)), x)


def test_an_outlier_is_spread() -> None:
    """What rotation is for: one channel of a key is far larger than the others."""
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 40
    lost = {}
    for name, y in {"plain": x, "turned": rotated(x)}.items():
        back = CODECS["int4"].decode(CODECS["int4"].encode(y, 64), 64, 64)
        lost[name] = float((back - y).norm())
    assert lost["turned"] < 0.6 * lost["plain"]


def test_a_matrix_made_from_fake_tensors_is_not_kept() -> None:
    """A graph that is only traced must not leave what has no contents behind."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode() as mode:
        assert isinstance(rotated(mode.from_tensor(torch.ones(1, 2048))), FakeTensor)
    x = rotated(torch.ones(1, 2048))
    assert type(x) is Tensor
    assert abs(float(x[0, 0]) - 2048**0.5) < 1e-3


def test_a_matrix_made_in_inference_mode_is_a_normal_one() -> None:
    with torch.inference_mode():
        rotated(torch.ones(1, 1024))
    x = torch.ones(1, 1024, requires_grad=True)
    rotated(x).sum().backward()
    assert x.grad is not None
