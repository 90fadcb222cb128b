"""A budget in bytes as one in slots: how many slots of a site hold so much of what an unmodified cache would."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, prod

import torch

from kvpass.kernels.budget import Apart, Budget
from kvpass.kernels.rule import Record, Rule
from kvpass.kernels.slots.state import Field, fields_of, sizes_of

ROOM = Fraction(41, 40)
"""Slots that are allocated for each that is kept: up to 2.5 % are free to grow into (`spare_slots`)."""


@dataclass(frozen=True)
class Entry:
    """What an unmodified cache holds for a token in one head.

    Attributes:
        d, v: entries of a key and of a value.
        dtype: theirs.
    """

    d: int
    v: int
    dtype: torch.dtype


EXAMPLE = Entry(64, 64, torch.float32)
"""Where no model is known."""


def in_bytes(share: Fraction, floor: int, rule: Rule, entry: Entry) -> tuple[Record, ...]:
    """Records of a budget by which a site under the other records of `rule` holds `share` of the bytes."""
    slot, apart = bytes_of(rule, entry)
    each = slot * ROOM
    kept = Fraction(share * (entry.d + entry.v) * entry.dtype.itemsize, each).limit_denominator(65_536)
    return Budget(0, kept.numerator, kept.denominator, floor), Apart(ceil(apart / each))


def bytes_of(rule: Rule, entry: Entry) -> tuple[int, int]:
    """Bytes of a slot of one head, and of what the head holds beside its slots."""
    sizes = sizes_of(rule, {"B": 1, "H": 1, "C": 1, "D": entry.d, "V": entry.v})

    def held(field: Field) -> int:
        return int(prod(sizes[letter] for letter in field.dims)) * (field.dtype or entry.dtype).itemsize

    fields = fields_of(rule)
    return sum(held(f) for f in fields if f.per_slot), sum(held(f) for f in fields if not f.per_slot)
