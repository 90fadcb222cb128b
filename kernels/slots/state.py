"""The state of one site as one record. Which tensors it has follows from the rule: a table of fields, from which follow
shapes, fills, and what growing, moving and picking rows do (`kvpass.kernels.slots.moves`).

Ops take and change it as a flat list of tensors, in the order of the fields: `State.of` and `State.tensors` are the
only way there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import FREE, LIVE
from kvpass.kernels.slots.ragged import columns
from kvpass.kernels.slots.statistics import Statistics
from torch import Tensor


@dataclass(frozen=True)
class Field:
    """One tensor of a state.

    Attributes:
        name: unique in a state.
        dims: a letter each: B rows, H KV heads, C slots, D and V entries of a key and of a value, N statistics, X
            columns of the cursor, W places beside the slots. B, H and C, where they are, stand side by side in this
            order.
        dtype: None for that of the keys.
        fill: what a slot, or a head, holds before something is written; None: anything. A sequence: along the last dim;
            `places`: 0, 1, .. along it.
        codes: whether it holds codes of keys or values, or their scales.
        positions: whether it holds positions in the sequence, -1 where none.
    """

    name: str
    dims: str
    dtype: torch.dtype | None
    fill: float | tuple[int, ...] | str | None
    codes: bool = False
    positions: bool = False

    @cached_property
    def per_slot(self) -> bool:
        """Whether it moves with the slots."""
        return "C" in self.dims

    @cached_property
    def rows(self) -> int:
        """The dim of the sequences; that of the slots is two behind, where there are any."""
        return self.dims.index("B")

    @property
    def entries(self) -> bool:
        """Whether it holds keys or values: what an unmodified cache holds too."""
        return self.codes or "D" in self.dims or "V" in self.dims

    def new(self, sizes: Mapping[str, Any], like: Tensor) -> Tensor:
        """As before the first token, on the device of `like` and, for keys and values, with its dtype."""
        shape, kind = [sizes[letter] for letter in self.dims], self.dtype or like.dtype
        if isinstance(self.fill, tuple):
            last = torch.tensor(self.fill, dtype=kind, device=like.device)
            return last[: shape[-1]].expand(shape).clone()
        if self.fill is None:
            return like.new_empty(shape, dtype=kind)
        if isinstance(self.fill, str):
            return torch.arange(shape[-1], dtype=kind, device=like.device).expand(shape).clone()
        return like.new_full(shape, self.fill, dtype=kind)


FIELDS = (
    Field("k", "BHCD", None, None),
    Field("v", "BHCV", None, None),
    Field("pos", "BHC", torch.int32, -1, positions=True),
    Field("stats", "NBHC", torch.float32, 0.0),
    Field("cursor", "BHX", torch.int32, (0, 0, 0, -1, 0, 0)),
)
"""What every state has: keys, values, positions (-1: the slot is empty), statistics, and the cursor
(`kvpass.kernels.slots.cursor`).
"""


def fields_of(rule: Rule) -> tuple[Field, ...]:
    """The fields of a state under a rule, in the order in which ops take its tensors."""
    found: tuple[Field, ...] | None = rule.derived.get(fields_of)
    if found is None:
        more = [field for record in rule for field in record.state_fields]
        other = {name: field for record in rule for name, field in record.replaced_fields.items()}
        own = tuple(other.get(field.name, field) for field in FIELDS)
        found = rule.derived[fields_of] = (*own, *more) if more or other else FIELDS
    return found


def sizes_of(rule: Rule, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The size of each dim of a rule's fields by its letter; sizes: B, H, C, D and V; W where it grows."""
    found = {**sizes, "N": len(rule[Statistics].stats), "X": columns(rule)}
    return found | {letter: size for record in rule for letter, size in record.sizes(found).items()}


class State:
    """Tensors of one site, by name; those of `FIELDS` are attributes that everybody knows.

    Args:
        tensors: in the order of the fields.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    stats: Tensor
    cursor: Tensor

    def __init__(self, tensors: Sequence[Tensor], fields: tuple[Field, ...] = FIELDS) -> None:
        self.fields = fields
        for field, tensor in zip(fields, tensors, strict=True):
            setattr(self, field.name, tensor)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], rule: Rule) -> State:
        """What an op was given.

        Raises:
            ValueError: not as many tensors as the rule's fields.
        """
        fields = fields_of(rule)
        if len(tensors) != len(fields):
            names = ", ".join(field.name for field in fields)
            raise ValueError(f"a state under this rule is {names}, got {len(tensors)} tensors")
        return cls(tensors, fields)

    @classmethod
    def empty(cls, rule: Rule, like: Tensor, **sizes: Any) -> State:
        """Without a token, on the device and with the dtype of `like`; sizes: B, H, C, D and V."""
        sizes, fields = sizes_of(rule, sizes), fields_of(rule)
        return cls([field.new(sizes, like) for field in fields], fields)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of a field."""
        found: Tensor = getattr(self, name)
        return found

    def tensors(self) -> list[Tensor]:
        """What an op is given."""
        return [getattr(self, field.name) for field in self.fields]

    def mapped(self, change: Callable[[Field, Tensor], Tensor]) -> State:
        """Another state, tensor by tensor."""
        made = [change(field, tensor) for field, tensor in zip(self.fields, self.tensors(), strict=True)]
        return State(made, self.fields)

    def clone(self) -> State:
        """A copy in memory of its own."""
        return self.mapped(lambda _, tensor: tensor.clone())

    def replaced(self, **tensors: Tensor) -> State:
        """The same with other tensors under some names."""
        return self.mapped(lambda field, tensor: tensors.get(field.name, tensor))

    @property
    def slots(self) -> int:
        """Capacity C: slots allocated per KV head."""
        return self.pos.shape[2]

    @property
    def places(self) -> int:
        """W: places per KV head beside the slots, 0 without such fields."""
        shaped = (self[field.name].shape[field.dims.index("W")] for field in self.fields if "W" in field.dims)
        return next(shaped, 0)

    def used(self) -> Tensor:
        """Slots in use, bool [B, Hkv, C]: 0 .. LIVE without FREE. Not of a ragged state."""
        slot = torch.arange(self.slots, device=self.pos.device)
        return (slot <= self.cursor[..., LIVE, None]) & (slot != self.cursor[..., FREE, None])

    def per_slot(self) -> list[tuple[Field, Tensor]]:
        """What moves with the slots."""
        return [(field, getattr(self, field.name)) for field in self.fields if field.per_slot]

    def bytes(self, entries: bool) -> int:
        """Bytes of keys and values, or of everything else."""
        both = zip(self.fields, self.tensors(), strict=True)
        return sum(t.numel() * t.element_size() for f, t in both if f.entries is entries)


def flat(field: Field, tensor: Tensor) -> Tensor:
    """A per-slot tensor with B, H and C as one dim, `field.rows`: a view of contiguous memory."""
    at, shape = field.rows, tensor.shape
    if tensor.numel() and len(field.dims) < 5:  # a step's; where sizes are unpacked, torch takes twice as long
        if at:
            return tensor.view(shape[0], -1)
        return tensor.view(-1) if len(shape) == 3 else tensor.view(-1, shape[3])
    return tensor.view(*shape[:at], shape[at] * shape[at + 1] * shape[at + 2], *shape[at + 3 :])
