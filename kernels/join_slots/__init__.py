"""join_slots: the keys an extend call sees, past slots in position order, then its own tokens. Pure torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvpass.kernels.codecs.entries import encoded, entries_of
from kvpass.kernels.codecs.storage import fit_fields
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.moves import side_by_side
from kvpass.kernels.slots.ragged import is_ragged
from kvpass.kernels.slots.state import FIELDS, Field, State
from torch import Tensor


def join_slots(state: Sequence[Tensor], k_new: Tensor, v_new: Tensor, position: int, rule: str) -> list[Tensor]:
    """Join the state and the new tokens of an extend call.

    state: the tensors of `State` under the rule; k_new [B, Hkv, S, D], v_new [B, Hkv, S, Dv] at positions
    position .. position + S - 1. Of a ragged state (`kvpass.kernels.slots.ragged`) a head may hold up to `position`
    keys: C is `position` then.

    Returns keys, values, then each other per-slot field of the state in order, with C + S for C: past slots by
    position, empties first (k, v and others zero, pos -1), then the new tokens, whose other fields hold their fills;
    codes are carried on beside the keys and values that they stand for, and those of new tokens made; undefined where
    heads are fitted (`encode_fitted` makes those). Raises ValueError on shapes that do not fit.
    """
    plan = Rule.parse(rule)
    held = State.of(state, plan)
    fits = k_new.shape[:2] == held.pos.shape[:2] and k_new.shape[2] == v_new.shape[2]
    if held.k.shape[:2] != held.pos.shape[:2] or not fits:
        shapes = f"k {list(held.k.shape)}, pos {list(held.pos.shape)}, k_new {list(k_new.shape)}"
        raise ValueError(f"join_slots: {shapes} do not fit")
    if is_ragged(held.cursor):
        held = side_by_side(held, position)
    past, order = held.pos.sort(-1)
    empty, queries = past < 0, k_new.shape[2]
    now = torch.arange(position, position + queries, dtype=past.dtype, device=past.device)
    codes = {} if fit_fields(plan) else encoded(k_new, v_new, held, plan)
    new = {"k": k_new, "v": v_new, "pos": now.expand(*past.shape[:2], queries), **codes}

    def joined(field: Field, tensor: Tensor) -> Tensor:
        axis, slots = field.rows + 2, tensor.shape[field.rows + 2]
        out = tensor.new_empty([n + queries if at == axis else n for at, n in enumerate(tensor.shape)])
        old, own = out.split([slots, queries], axis)
        if field.name == "pos":
            old.copy_(past)
        else:
            _take(field, tensor, order, empty, old)
        own.copy_(new[field.name] if field.name in new else _fills(field, tensor, queries))
        return out

    entries = [joined(field, entries_of(held, field.name, plan)) for field in FIELDS if field.name in ("k", "v")]
    return entries + [joined(field, tensor) for field, tensor in held.per_slot() if field.name not in ("k", "v")]


def _take(field: Field, tensor: Tensor, order: Tensor, empty: Tensor, out: Tensor) -> None:
    """Write slots of a field in the given order [B, Hkv, C], with the undefined contents of empties zeroed: into what
    is joined, so that a layer is never there three times.
    """
    behind = (1,) * (tensor.dim() - field.rows - 3)
    index, hidden = (x.view(*x.shape, *behind).expand_as(tensor) for x in (order, empty))
    torch.gather(tensor, field.rows + 2, index, out=out)
    out.masked_fill_(hidden, 0)


def _fills(field: Field, tensor: Tensor, count: int) -> Tensor:
    """What the slots of `count` new tokens begin with."""
    sizes = {**dict(zip(field.dims, tensor.shape, strict=True)), "C": count}
    return field.new(sizes, tensor)
