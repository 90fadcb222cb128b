"""`kvpass::decode_step`: `decode_attend` that returns the state instead of changing it, for programs without side
effects; and `kvpass::decode_step_biased`, where slots have a bias.

Their bodies clone the state and run the kernel of `decode_attend`; `decompositions` says the same in plain torch, for
compilers that have no kernel. Importing this module registers the ops once per process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpass.kernels.slots.bias import BIAS_FIELD
from kvpass.kernels.slots.state import FIELDS, Field, State
from kvpass.ops import NAMESPACE, decode_attend

BEFORE = 4
"""Arguments before the state: q, new key and value, mask."""

BETWEEN = 5
"""Arguments from the state to the memory's keys: position, scale, rule, sinks, softcap."""


@dataclass(frozen=True)
class _Form:
    """One op: the tensors of its state are arguments one by one, because other compilers take no lists."""

    name: str
    fields: tuple[Field, ...]

    @property
    def schema(self) -> str:
        """Its arguments and results."""
        state = ", ".join(f"Tensor {field.name}" for field in self.fields)
        return (
            f"(Tensor q, Tensor k_new, Tensor v_new, Tensor? mask, {state}, "
            "SymInt position, float scale, str rule, Tensor? sinks=None, float softcap=0.0, "
            "Tensor? memory_k=None, Tensor? memory_v=None) "
            f"-> (Tensor{', Tensor' * len(self.fields)})"
        )

    @property
    def op(self) -> Any:
        """The registered op."""
        return getattr(torch.ops.kvpass, self.name).default

    def parted(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor], tuple[Any, ...]]:
        """Arguments before the state, the state, and those behind it."""
        end = BEFORE + len(self.fields)
        return args[:BEFORE], list(args[BEFORE:end]), args[end:]

    def body(self, *args: Any) -> tuple[Tensor, ...]:
        """What it computes."""
        before, held, behind = self.parted(args)
        state, memory = [t.clone() for t in held], dict(zip(("memory_k", "memory_v"), behind[BETWEEN:], strict=False))
        return (decode_attend(*before, state, *behind[:BETWEEN], **memory), *state)

    def fake(self, *args: Any) -> tuple[Tensor, ...]:
        """Sizes of what it returns."""
        (q, k_new, v_new, _), tensors, _ = self.parted(args)
        held = State(tensors, self.fields)
        for field, tensor in zip(self.fields, tensors, strict=True):
            if field.per_slot:
                torch._check(tensor.shape[field.dims.index("C")] == held.k.shape[2])
        for rows in (q, k_new, v_new):
            torch._check(rows.shape[0] == held.k.shape[0])
        for field, tensor in zip(self.fields, tensors, strict=True):
            torch._check(tensor.shape[field.rows] == held.k.shape[0])
        out = q.new_empty(q.shape[0], q.shape[1], q.shape[2], v_new.shape[3])
        return out, *(t.new_empty(t.shape) for t in tensors)

    def decomposed(self, *args: Any, **memory: Tensor) -> tuple[Tensor, ...]:
        """The same in plain torch."""
        from kvpass.kernels.decode_attend.functional import decode_step as step

        run: Callable[..., list[Tensor]] = step
        before, held, behind = self.parted(args)
        return tuple(run(*before, held, *behind, **memory))

    def register(self) -> torch.library.Library | None:
        """Define and implement the op; None if this process already has it."""
        if hasattr(torch.ops.kvpass, self.name):
            return None
        library = torch.library.Library(NAMESPACE, "FRAGMENT")
        library.define(self.name + self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(self.name, self.body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", self.fake, lib=library)
        return library


_FORMS = (_Form("decode_step", FIELDS), _Form("decode_step_biased", (*FIELDS, BIAS_FIELD)))
_libraries = [form.register() for form in _FORMS]


def step_of(tensors: int) -> Any:
    """The op of a state of so many tensors."""
    return next(form.op for form in _FORMS if len(form.fields) == tensors)


def step_named(name: str) -> Any:
    """The op of that name."""
    return next(form.op for form in _FORMS if form.name == name)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Each op of a pure program as plain torch, for `ExportedProgram.run_decompositions`."""
    return {form.op: form.decomposed for form in _FORMS}
