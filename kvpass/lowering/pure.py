"""`kvpass::decode_step`: `decode_attend` that returns the state instead of changing it, for programs without side
effects.

Its body clones the state and runs the kernel of `decode_attend`; `decomposition` says the same in plain torch, for
compilers that have no kernel. Importing this module registers the op once per process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvpass.kernels.slots.state import FIELDS, State
from kvpass.ops import NAMESPACE, decode_attend

STATE = slice(4, 4 + len(FIELDS))
"""Places of the state among the arguments: one by one, because other compilers take no lists."""

SCHEMA = (
    f"(Tensor q, Tensor k_new, Tensor v_new, Tensor? mask, {', '.join(f'Tensor {field.name}' for field in FIELDS)}, "
    "SymInt position, float scale, str rule, Tensor? sinks=None, float softcap=0.0, "
    "Tensor? memory_k=None, Tensor? memory_v=None) "
    f"-> (Tensor{', Tensor' * len(FIELDS)})"
)


MEMORY = STATE.stop + 5
"""Place of the memory's keys, behind the numbers and the sinks."""


def _body(*args: Any) -> tuple[Tensor, ...]:
    state, memory = [t.clone() for t in args[STATE]], dict(zip(("memory_k", "memory_v"), args[MEMORY:], strict=False))
    return (decode_attend(*args[: STATE.start], state, *args[STATE.stop : MEMORY], **memory), *state)


def _fake(q: Tensor, k_new: Tensor, v_new: Tensor, mask: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    held = State(rest[: len(FIELDS)])
    for field, tensor in zip(FIELDS, held.tensors(), strict=True):
        if field.per_slot:
            torch._check(tensor.shape[field.dims.index("C")] == held.k.shape[2])
    for rows in (q, k_new, v_new):
        torch._check(rows.shape[0] == held.k.shape[0])
    for field, tensor in zip(FIELDS, held.tensors(), strict=True):
        torch._check(tensor.shape[field.rows] == held.k.shape[0])
    out = q.new_empty(q.shape[0], q.shape[1], q.shape[2], v_new.shape[3])
    return out, *(t.new_empty(t.shape) for t in held.tensors())


def _register() -> torch.library.Library | None:
    """Define and implement the op; None if this process already has it."""
    if hasattr(torch.ops.kvpass, "decode_step"):
        return None
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define("decode_step" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("decode_step", _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::decode_step", _fake, lib=library)
    return library


_library = _register()

decode_step = torch.ops.kvpass.decode_step.default


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Each op of a pure program as plain torch, for `ExportedProgram.run_decompositions`."""
    from kvpass.kernels.decode_attend.functional import decode_step as step

    run: Callable[..., list[Tensor]] = step

    def flat(*args: Any, **memory: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(*args[: STATE.start], args[STATE], *args[STATE.stop :], **memory))

    return {decode_step: flat}
