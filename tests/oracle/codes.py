"""Codecs once more, number by number in plain Python: what a vector's codes are, and what they stand for.

Every step is rounded as float32 rounds it; scales and lowest values are float16 numbers.
"""

from __future__ import annotations

import math
import struct
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Parts = dict[str, list[Any]]
"""`codes`, `scale` and, where a codec has it, `low`, as lists."""

ASYMMETRIC = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
SYMMETRIC = {"int8_symmetric": 8, "int4_symmetric": 4}
FLOATS = {"fp8_e4m3": (3, 7, 448.0), "fp8_e5m2": (2, 15, 57344.0)}
"""Bits of the fraction, bias of the exponent, largest number."""
TOP = {"fp8_e4m3": 448.0, "fp8_e5m2": 448.0}
"""What the largest entry of a group becomes. By the largest of e5m2, 57344, scales would be too small for float16."""
LEVELS = ("float16", "turbo4", "turbo3", "turbo2", "ternary", "mixed_2_1")
NORMAL = {
    "turbo4": [0.1284, 0.3881, 0.6569, 0.9424, 1.2563, 1.6179, 2.0684, 2.7309],
    "turbo3": [0.245, 0.7556, 1.3432, 2.1504],
    "turbo2": [0.4526, 1.5096],
}
"""Levels above 0 (policies-2.md, S5.4)."""
NAMES = (*ASYMMETRIC, *SYMMETRIC, *FLOATS, *LEVELS)
MOST = 65504.0


def f32(x: float) -> float:
    """The nearest float32, ties to even."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


def f16(x: float) -> float:
    """The nearest float16, ties to even; at most its largest."""
    return float(struct.unpack("e", struct.pack("e", max(-MOST, min(MOST, x))))[0])


def to_half(x: float) -> float:
    return math.nan if math.isnan(x) else f16(x)


def clamped(x: float, most: float) -> float:
    return x if math.isnan(x) else max(-most, min(most, x))


def groups(x: list[float], size: int) -> list[list[float]]:
    """Neighbours that share a scale; the last ones may be fewer."""
    return [x[at : at + size] for at in range(0, len(x), size)]


def eight_bits(x: float, name: str) -> int:
    """The byte of the nearest number of an 8-bit format, ties to even; x within its range."""
    fraction, bias, _ = FLOATS[name]
    sign = 128 if math.copysign(1.0, x) < 0 else 0
    if math.isnan(x):
        return 127
    if x == 0:
        return sign
    exponent = max(math.floor(math.log2(abs(x))), 1 - bias)
    units = round(abs(x) / 2.0 ** (exponent - fraction))  # of the last place
    # bits of exponent and fraction are one number: a carry goes from one into the other by itself
    return sign | (((exponent + bias - 1) << fraction) + units)


def number_of(byte: int, name: str) -> float:
    """What a byte of an 8-bit format says."""
    fraction, bias, _ = FLOATS[name]
    sign, rest = (-1.0 if byte & 128 else 1.0), byte & 127
    exponent, units = rest >> fraction, rest & ((1 << fraction) - 1)
    if rest == 127 or (name == "fp8_e5m2" and exponent == 31 and units):
        return math.nan
    if exponent == 0:
        return sign * units * 2.0 ** (1 - bias - fraction)
    return sign * (1 + units / (1 << fraction)) * 2.0 ** (exponent - bias)


def encoded(x: list[float], name: str, group: int) -> Parts:
    """Codes (one for each entry, not packed), scales and lowest values of a vector."""
    if name in LEVELS:
        return by_level(x, name, group)
    out: Parts = {"codes": [], "scale": []}
    if name in ASYMMETRIC:
        out["low"] = []
    for part in groups([clamped(f32(one), MOST) for one in x], group):
        broken = any(math.isnan(one) for one in part)
        if name in ASYMMETRIC:
            most = 2 ** ASYMMETRIC[name] - 1
            low, high = (math.nan, math.nan) if broken else (min(part), max(part))
            scale, low = to_half(f32(f32(high - low) / most)), to_half(low)
            step = scale if scale > 0 else 1.0
            steps = [f32(f32(one - low) / step) for one in part]
            out["low"].append(low)
            out["codes"] += [None if broken else max(0, min(most, round(one))) for one in steps]
        else:
            largest = math.nan if broken else max(abs(one) for one in part)
            most = 2 ** (SYMMETRIC[name] - 1) - 1 if name in SYMMETRIC else TOP[name]
            scale = to_half(f32(largest / most))
            step = scale if scale > 0 else 1.0
            steps = [clamped(f32(one / step), most) for one in part]
            if name in SYMMETRIC:
                out["codes"] += [None if broken else int(most) + round(one) for one in steps]
            else:
                out["codes"] += [eight_bits(one, name) for one in steps]
        out["scale"].append(scale)
    return out


def decoded(parts: Parts, name: str, group: int) -> list[float]:
    """What the codes of a vector stand for."""
    if name == "float16":
        return list(parts["codes"])
    if name == "mixed_2_1":
        first, rest = halves(parts, group)
        return decoded(first, "int2", group) + decoded(rest, "int1", group)
    found = []
    for at, code in enumerate(parts["codes"]):
        scale = parts["scale"][at // group]
        if math.isnan(scale):
            found.append(math.nan)
        elif name in ASYMMETRIC or name == "int1":
            found.append(f32(parts["low"][at // group] + code * scale))
        elif name == "ternary":
            found.append((code - 1) * scale)
        elif name in NORMAL:
            found.append(f32(levels(name)[code] * scale))
        elif name in SYMMETRIC:
            found.append(f32((code - (2 ** (SYMMETRIC[name] - 1) - 1)) * scale))
        else:
            found.append(f32(number_of(code, name) * scale))
    return found


def by_level(x: list[float], name: str, group: int) -> Parts:
    """float16 numbers; signs times the mean size of a group (VidKV); or two bits for the first half, signs behind."""
    x = [clamped(f32(one), MOST) for one in x]
    if name == "float16":
        return {"codes": [to_half(one) for one in x]}
    if name == "mixed_2_1":
        count = (len(x) + 1) // 2
        first, rest = encoded(x[:count], "int2", group), x[count:]
        sizes = [mean_size(part) for part in groups(rest, group)]
        return {
            "codes": first["codes"] + [int(one >= 0) for one in rest],
            "scale": first["scale"] + [to_half(2 * size) for size in sizes],
            "low": first["low"] + [-size for size in sizes],
        }
    if name in NORMAL:
        found = [normal(part, name) for part in groups(x, group)]
        return {"codes": [code for codes, _ in found for code in codes], "scale": [scale for _, scale in found]}
    sizes = [mean_size(part) for part in groups(x, group)]
    codes = [1 + (one > sizes[at // group] / 2) - (one < -sizes[at // group] / 2) for at, one in enumerate(x)]
    return {"codes": codes, "scale": sizes}


def levels(name: str) -> list[float]:
    """All levels, as float32 holds them, from the lowest on."""
    return [f32(x) for x in sorted([-x for x in NORMAL[name]] + NORMAL[name])]


def normal(part: list[float], name: str) -> tuple[list[int | None], float]:
    """Each entry's level once the group's norm is the root of its size; what gives the levels that norm again."""
    if any(math.isnan(one) for one in part):
        return [None] * len(part), math.nan
    table, norm = levels(name), math.sqrt(math.fsum(one * one for one in part))
    unit = [one / (norm or 1.0) * math.sqrt(len(part)) for one in part]
    codes = [sum((low + high) / 2 <= one for low, high in pairwise(table)) for one in unit]
    return codes, to_half(f32(norm / math.sqrt(math.fsum(table[code] ** 2 for code in codes))))


def mean_size(part: list[float]) -> float:
    return to_half(f32(math.fsum(abs(one) for one in part) / len(part)))


def halves(parts: Parts, group: int) -> tuple[Parts, Parts]:
    """The two of `mixed_2_1`."""
    count = (len(parts["codes"]) + 1) // 2
    at = {"codes": count, "scale": -(-count // group), "low": -(-count // group)}
    return {k: x[: at[k]] for k, x in parts.items()}, {k: x[at[k] :] for k, x in parts.items()}


def in_memory(codes: list[Any], name: str) -> list[Any]:
    """Packed, as slots hold them."""
    if name == "float16":
        return codes
    if name == "mixed_2_1":
        count = (len(codes) + 1) // 2
        return packed(codes[:count], 2) + packed(codes[count:], 1)
    if name == "ternary":  # byte j of n: the codes j, j + n, .., of which each counts three times the one before
        size = -(-len(codes) // 5)
        return [sum(code * 3**at for at, code in enumerate(codes[j::size])) for j in range(size)]
    return packed(codes, bits_of(name))


def packed(codes: list[int], bits: int) -> list[int]:
    """Several codes in a byte. 3 bits are two runs, of each code's lowest two and of its highest; likewise 5, 6 and 7.
    In a run of n bytes, byte j holds codes j, j + n, j + 2n, .. from the lowest bits on.
    """
    out, shift = [], 0
    for own in {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[bits]:
        count = -(-len(codes) * own // 8)
        run = [0] * count
        for at, code in enumerate(codes):
            run[at % count] |= ((code >> shift) % 2**own) << (own * (at // count))
        out += run
        shift += own
    return out


def bits_of(name: str) -> int:
    return {**ASYMMETRIC, **SYMMETRIC, **{each: int(each[-1]) for each in NORMAL}}.get(name, 8)


def hadamard(width: int) -> Tensor:
    """float64 [width, width]: blocks of the largest power of two that divides it, entry (i, j) of one is -1 to the
    number of bits that i and j share, divided by the root of its size.
    """
    size = max(n for n in (2**e for e in range(20)) if width % n == 0)
    block = [[(-1.0) ** (i & j).bit_count() / size**0.5 for j in range(size)] for i in range(size)]
    return torch.block_diag(*[torch.tensor(block, dtype=torch.float64)] * (width // size))


def read_back(x: Tensor, name: str, group: int, rotate: bool) -> Tensor:
    """float64 [.., width]: what vectors are read as once they have been held as codes."""
    if name == "dense":
        return x.double()
    turn = hadamard(x.shape[-1]) if rotate else torch.eye(x.shape[-1], dtype=torch.float64)
    rows = (x.double() @ turn).flatten(0, -2).tolist()
    held = [decoded(encoded(row, name, group), name, group) for row in rows]
    return (torch.tensor(held, dtype=torch.float64) @ turn).view(x.shape)
