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

from kvpass.ops import NAMESPACE, decode_attend

SCHEMA = (
    "(Tensor q, Tensor k_new, Tensor v_new, Tensor? mask, Tensor[] state, SymInt position, float scale, str rule, "
    "Tensor? sinks=None, float softcap=0.0) -> Tensor[]"
)
STATE = 4
"""Place of the state among the arguments."""


def _body(*args: Any) -> list[Tensor]:
    state = [t.clone() for t in args[STATE]]
    return [decode_attend(*args[:STATE], state, *args[STATE + 1 :]), *state]


def _fake(q: Tensor, k_new: Tensor, v_new: Tensor, mask: Tensor | None, state: Any, *rest: Any) -> list[Tensor]:
    from kvpass.kernels.rule import Rule
    from kvpass.kernels.slots.state import State

    held = State.of(state, Rule.parse(rest[2]))
    for field, tensor in zip(held.fields, state, strict=True):
        torch._check(tensor.shape[field.rows] == q.shape[0])
        if field.per_slot:
            torch._check(tensor.shape[field.dims.index("C")] == held.slots)
    for new in (k_new, v_new):
        torch._check(new.shape[0] == q.shape[0])
    out = q.new_empty(q.shape[0], q.shape[1], q.shape[2], v_new.shape[3])
    return [out, *(t.new_empty(t.shape) for t in state)]


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

    return {decode_step: step}
