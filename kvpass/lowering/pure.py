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
    "(Tensor q, Tensor k_new, Tensor v_new, Tensor? mask, Tensor k, Tensor v, Tensor pos, Tensor stats, Tensor cursor, "
    "SymInt position, float scale, str rule, Tensor? sinks=None, float softcap=0.0) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
STATE = slice(4, 9)
"""Places of the state among the arguments."""


def _body(*args: Any) -> tuple[Tensor, ...]:
    state = tuple(t.clone() for t in args[STATE])
    return (decode_attend(*args[:4], *state, *args[9:]), *state)


def _fake(q: Tensor, k_new: Tensor, v_new: Tensor, mask: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    k, v, pos, stats, cursor = state = rest[:5]
    for other in (v.shape[2], pos.shape[2], stats.shape[3]):
        torch._check(other == k.shape[2])
    for rows in (q.shape[0], k_new.shape[0], v_new.shape[0], v.shape[0], pos.shape[0], stats.shape[1], cursor.shape[0]):
        torch._check(rows == k.shape[0])
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v_new.shape[3]), *(t.new_empty(t.shape) for t in state)


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
