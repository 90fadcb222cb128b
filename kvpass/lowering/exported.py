"""A pure graph module as an ExportedProgram: traced again, because its fake values belong to another tracer."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from kvpass.graph.calls import example
from kvpass.lowering.standalone import TOKENS

HINTS = {"capacity": 12, "tokens": 7}
"""Sizes to trace with; no result depends on them."""


def any_size() -> Any:
    """While tracing: let sizes be 0 and 1, as they are in the first steps; torch.export would rule them out."""
    from torch.fx.experimental import _config

    return _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]  # torch adds it on import


def exported(gm: fx.GraphModule) -> ExportedProgram:
    """`tokens`, capacities and whatever was dynamic before stay dynamic."""
    args, shapes = [], []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            arg, shape = _example_input(str(node.target), example(node))
            args.append(arg)
            shapes.append(shape)
    with torch.no_grad(), any_size():
        return torch.export.export(gm, tuple(args), dynamic_shapes=tuple(shapes))


def _example_input(name: str, fake: Any) -> tuple[Any, Any]:
    """A value to trace with, and which of its sizes change from call to call."""
    if name == TOKENS:
        return HINTS["tokens"], Dim.DYNAMIC
    if not isinstance(fake, torch.Tensor):
        return (_hint(fake), Dim.DYNAMIC) if isinstance(fake, torch.SymInt) else (fake, None)
    sizes = [_hint(size) for size in fake.shape]
    dynamic = {at: Dim.DYNAMIC for at, size in enumerate(fake.shape) if isinstance(size, torch.SymInt)}
    value = torch.zeros(sizes, dtype=fake.dtype, device=fake.device)
    return value, dynamic or None


def _hint(size: Any) -> int:
    """A size for tracing; capacities are hinted at thousands of slots, which need no memory here."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    hint = int(size.node.hint)
    return HINTS["capacity"] if hint > 4000 else hint
