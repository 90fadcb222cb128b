"""`kvpass::decode_step`: `decode_attend` that returns the state instead of changing it, for programs without side
effects.

Its body clones the state and runs the kernel of `decode_attend`; `decomposition` says the same in plain torch, for
compilers that have no kernel. Importing this module registers the op once per process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.state import FIELDS, State
from kvpass.ops import NAMESPACE, decode_attend

FIRST = 4
"""Place of the state's first tensor among the arguments: they are handed over one by one, because other compilers take
no lists.
"""


def step_op(count: int) -> Any:
    """The op of states of `count` tensors: `kvpass::decode_step`, or `kvpass::decode_step_7` and so on where slots have
    more fields than usual (codes). Each is registered once per process.
    """
    name = "decode_step" if count == len(FIELDS) else f"decode_step_{count}"
    if count not in _LIBRARIES and not hasattr(torch.ops.kvpass, name):
        _LIBRARIES[count] = _registered(name, count)
    return getattr(torch.ops.kvpass, name).default


_LIBRARIES: dict[int, torch.library.Library] = {}
"""Kept, or the ops would go with them."""


def _registered(name: str, count: int) -> torch.library.Library:
    fields = [field.name for field in FIELDS] + [f"more_{n}" for n in range(1, count - len(FIELDS) + 1)]
    behind = FIRST + count

    def body(*args: Any) -> tuple[Tensor, ...]:
        state, memory = [t.clone() for t in args[FIRST:behind]], dict(zip(MEMORY, args[behind + 5 :], strict=False))
        return (decode_attend(*args[:FIRST], state, *args[behind : behind + 5], **memory), *state)

    def fake(q: Tensor, k_new: Tensor, v_new: Tensor, mask: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        held = State.of(rest[:count], Rule.parse(rest[count + 2]))
        for rows in (q, k_new, v_new):
            torch._check(rows.shape[0] == held.k.shape[0])
        for field, tensor in zip(held.fields, held.tensors(), strict=True):
            torch._check(tensor.shape[field.rows] == held.k.shape[0])
            if field.per_slot:
                torch._check(tensor.shape[field.dims.index("C")] == held.slots)
        out = q.new_empty(q.shape[0], q.shape[1], q.shape[2], v_new.shape[3])
        return out, *(t.new_empty(t.shape) for t in held.tensors())

    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define(name + _schema(fields), tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return library


MEMORY = ("memory_k", "memory_v")


def _schema(fields: Sequence[str]) -> str:
    return (
        f"(Tensor q, Tensor k_new, Tensor v_new, Tensor? mask, {', '.join(f'Tensor {name}' for name in fields)}, "
        "SymInt position, float scale, str rule, Tensor? sinks=None, float softcap=0.0, "
        f"{', '.join(f'Tensor? {name}=None' for name in MEMORY)}) -> (Tensor{', Tensor' * len(fields)})"
    )


decode_step = step_op(len(FIELDS))


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Each op of a pure program as plain torch, for `ExportedProgram.run_decompositions`."""
    from kvpass.kernels.decode_attend.functional import decode_step as step

    run: Callable[..., list[Tensor]] = step

    def of(count: int) -> Callable[..., tuple[Tensor, ...]]:
        behind = FIRST + count

        def flat(*args: Any, **memory: Tensor) -> tuple[Tensor, ...]:
            return tuple(run(*args[:FIRST], args[FIRST:behind], *args[behind:], **memory))

        return flat

    return {step_op(count): of(count) for count in {len(FIELDS), *_LIBRARIES}}
