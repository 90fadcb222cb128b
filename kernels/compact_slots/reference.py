"""Reference of compact_slots in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvpass.kernels.slots.cursor import LIVE
from kvpass.kernels.slots.ragged import starts
from kvpass.kernels.slots.state import Field, State, flat
from torch import Tensor


def compact_slots_reference(keys: Sequence[Tensor | None], idx: Tensor, cursor_new: Tensor, out: State) -> None:
    """See `kvpass.kernels.compact_slots.compact_slots`."""
    out.pos.fill_(-1)
    first = starts(cursor_new, out.slots).tolist()
    fields = [(field, flat(field, target), given) for (field, target), given in zip(out.per_slot(), keys, strict=True)]
    for b, counts in enumerate(cursor_new[..., LIVE].tolist()):
        for h, live in enumerate(counts):
            # One gather per head: ragged counts need no mask, and nothing beyond LIVE is touched.
            rows = idx[b, h, :live]
            for field, target, given in fields:
                there = target.narrow(field.rows, first[b][h], live)
                _fill(field, there, None if given is None else given.select(field.rows, b).select(field.rows, h), rows)
    out.cursor.copy_(cursor_new)


def _fill(field: Field, there: Tensor, given: Tensor | None, rows: Tensor) -> None:
    """What the keys `rows` of one head have goes into its slots."""
    if given is not None and field.rows == 0:
        torch.index_select(given, 0, rows, out=there)
    elif given is not None:
        there.copy_(given.index_select(field.rows, rows))
    elif field.name == "pos":
        there.copy_(rows)
    elif isinstance(field.fill, (int, float)):
        there.fill_(field.fill)
