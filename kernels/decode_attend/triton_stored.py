"""Slots that hold codes, around decode_attend's kernels: which codecs these read, in which constants; and what torch
does to a step's token before they run. Nothing is read back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from kvpass.kernels.choose import WIDEST
from kvpass.kernels.codecs.codec import groups_of
from kvpass.kernels.codecs.entries import decoded, encoded, fit, turned
from kvpass.kernels.codecs.registry import DENSE
from kvpass.kernels.codecs.storage import HALVES, Storage, coded
from kvpass.kernels.codecs.whole import keep_whole
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import FREE, SEEN
from kvpass.kernels.slots.ragged import starts
from kvpass.kernels.slots.state import State
from kvpass.kernels.triton_shared.triton_launch import power_of_two
from torch import Tensor

from .call import Call, Token
from .device import arrived_rows

READ = {
    DENSE: ("dense", 0),
    "int8": ("low", 8),
    "int4": ("low", 4),
    "int3": ("low", 3),
    "int2": ("low", 2),
    "int8_symmetric": ("middle", 8),
    "int4_symmetric": ("middle", 4),
    "turbo4": ("normal", 4),
    "turbo3": ("normal", 3),
    "turbo2": ("normal", 2),
    "fp8_e4m3": ("e4m3", 8),
    "fp8_e5m2": ("e5m2", 8),
}
"""The codecs that the kernels read: how (`triton_codes.number_of`; `low` adds a lowest number), and bits of a code."""


def readable(storage: Storage) -> bool:
    """Whether the kernels read such slots: these codecs, and no word that is not named here (fits are not)."""
    known = Storage(
        storage.k_as, storage.v_as, storage.scale_group, storage.rotated, storage.residual, storage.whole_sinks
    )
    return storage == known and {storage.k_as, storage.v_as} <= READ.keys()


def columns(rule: Rule, half: str, width: int) -> dict[str, int]:
    """How a tile of keys (`k`) or values (`v`) is laid out: its columns, and of coded ones the entries that share a
    scale and the columns that these get, powers of two (`triton_codes`).
    """
    if half not in coded(rule):
        return {"columns": power_of_two(width, 16), "group": 0, "each": 0}
    group = min(rule[Storage].scale_group, width)
    groups = power_of_two(groups_of(width, group))
    each = power_of_two(group, -(-16 // groups))
    return {"columns": groups * each, "group": group, "each": each}


def stored(rule: Rule, dim: int, wide: int) -> dict[str, Any]:
    """Constants of `split_kernel`: how slots hold keys of `dim` entries and values of `wide`."""
    storage, found = rule[Storage], dict[str, Any]()
    for half, name, width, many in (("k", storage.k_as, dim, "BD"), ("v", storage.v_as, wide, "BDV")):
        (how, bits), laid, letter = READ[name], columns(rule, half, width), half.upper()
        found |= {f"{letter}_AS": how, f"{letter}_BITS": bits, many: laid["columns"]}
        found |= {f"{letter}_GROUP": laid["group"], f"{letter}_EACH": laid["each"]}
    return {**found, "COPIES": storage.whole if coded(rule) else 0}


def fits(rule: Rule, dim: int, wide: int) -> bool:
    """Whether tiles of coded slots are no wider than those of the widest dense heads: odd groups are spread out."""
    return all(columns(rule, half, width)["columns"] <= WIDEST for half, width in (("k", dim), ("v", wide)))


class Entered(NamedTuple):
    """What the kernels read of a step whose slots hold codes."""

    token: Token
    """As attention reads it: turned, and what its codes say if it has no whole copy."""
    keys: Tensor
    """Dense slots [B, Hkv, C, D], or whole copies [B, Hkv, W, D] turned as codes are."""
    values: Tensor
    codes: tuple[Tensor | None, ...]
    """Codes, scales and lowest numbers of keys, then of values; None for what there is not."""


NO_CODES: tuple[Tensor | None, ...] = (None,) * 6


def enter(token: Token, state: State, call: Call) -> Entered:
    """Write a token's codes into its slots, and its whole copy where it gets one.

    Codes go to the free slot in rows whose token is padding too: nobody reads it.
    """
    rule, cursor = call.rule, state.cursor
    now = torch.full((1, 1, 1), call.position, dtype=torch.int32, device=cursor.device)
    now = now if call.at is None else call.at.view(1, 1, 1).int()
    parts = encoded(token.k, token.v, state, rule)
    places = (starts(cursor, state.slots) + cursor[..., FREE]).flatten()
    for name, part in parts.items():
        state[name].flatten(0, 2).index_copy_(0, places, part.flatten(0, 2))
    valid = arrived_rows(call, now)[:, :, 0].expand(len(token.k), 1)
    keep_whole(token.k, token.v, now.flatten(), valid, cursor[:, :1, SEEN], state, rule)
    k, v = (_as_read(x, half, parts, cursor, rule) for half, x in (("k", token.k), ("v", token.v)))
    read = Token(_turned(token.q, "k", rule), k, v, token.arrive)
    return Entered(read, _turned(state.k, "k", rule), _turned(state.v, "v", rule), _code_tensors(state, rule))


def _code_tensors(state: State, rule: Rule) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = []
    for half in HALVES:
        held = [state[name] for name in rule[Storage].code_fields(half)] if half in coded(rule) else []
        found += [*held, *[None] * (3 - len(held))]
    return tuple(found)


def _as_read(x: Tensor, half: str, parts: dict[str, Tensor], cursor: Tensor, rule: Rule) -> Tensor:
    """Keys or values [B, Hkv, 1, width] of the token."""
    storage = rule[Storage]
    own = _turned(x, half, rule)
    if storage.residual or half not in coded(rule):
        return own
    held = [parts[name] for name in storage.code_fields(half)]
    codes = decoded(held, half, fit(parts, half, x.shape[3], rule), rule).to(x.dtype)
    return torch.where(cursor[..., SEEN, None, None] < storage.whole_sinks, own, codes) if storage.whole else codes


def turns(rule: Rule, half: str) -> bool:
    """Whether slots hold that half turned."""
    return rule[Storage].rotated and half in coded(rule)


def _turned(x: Tensor, half: str, rule: Rule) -> Tensor:
    """As slots hold it, in its own dtype."""
    return turned(x.float(), half, rule).to(x.dtype) if turns(rule, half) else x
