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


def in_bytes(share: Fraction, floor: int, rule: Rule, entry: Entry) -> tuple[Record, ...] | None:
    """Records of a budget by which a site under the other records of `rule` holds `share` of the bytes. Where it
    demotes, the codes of all tokens come first, and the rest is for whole copies: None if there is no rest.
    """
    slot, apart = bytes_of(rule, entry)
    left, each = share * dense_bytes(entry), slot * ROOM
    if rule.demotes:
        left, each = left - each, copy_bytes(rule, entry) * ROOM
    if left <= 0:
        return None
    kept = Fraction(left, each).limit_denominator(65_536)
    return Budget(0, kept.numerator, kept.denominator, floor), Apart(ceil(apart / each))


def least_share(rule: Rule, entry: Entry) -> float:
    """The share of the bytes that the codes of all tokens hold."""
    return float(bytes_of(rule, entry)[0] * ROOM / dense_bytes(entry))


def dense_bytes(entry: Entry) -> int:
    """Bytes that an unmodified cache holds for a token in one head."""
    return (entry.d + entry.v) * entry.dtype.itemsize


def bytes_of(rule: Rule, entry: Entry) -> tuple[int, int]:
    """Bytes of a slot of one head, and of what the head holds beside its slots: without copies that grow in number."""
    held = field_bytes(rule, entry, 1, 0)
    return sum(held[f] for f in held if f.per_slot), sum(held[f] for f in held if not f.per_slot)


def copy_bytes(rule: Rule, entry: Entry) -> int:
    """Bytes of a whole copy of a token in one head, where they grow in number."""
    return sum(size for field, size in field_bytes(rule, entry, 1, 1).items() if "W" in field.dims)


def field_bytes(rule: Rule, entry: Entry, slots: int, copies: int) -> dict[Field, int]:
    """Bytes of each field of one head with so many slots and, where they grow in number, whole copies."""
    sizes = sizes_of(rule, {"B": 1, "H": 1, "C": slots, "W": copies, "D": entry.d, "V": entry.v})

    def held(field: Field) -> int:
        return int(prod(sizes[letter] for letter in field.dims)) * (field.dtype or entry.dtype).itemsize

    return {field: held(field) for field in fields_of(rule)}
