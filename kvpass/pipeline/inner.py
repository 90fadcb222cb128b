"""Handing a graph to the inner compiler: whole, or one layer for all layers that are alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from kvpass.pipeline.progress import compiling

INNER = ("inductor", "aot_eager", "eager")


def compile_inner(name: str, gm: fx.GraphModule, inputs: list[Any], title: str = "a graph") -> Callable[..., Any]:
    """Compile a traced graph.

    Args:
        name: one of `INNER`.
        inputs: fake inputs with symbolic sizes, one for each placeholder. Real ones would freeze the sizes.
        title: what the user is told is being compiled.
    """
    if name == "eager":
        return gm.forward
    from kvpass.pipeline.regions import regions
    from kvpass.pipeline.stitch import Stitched

    parts = regions(gm) if _may_be_cut() else None
    if parts is None:
        with compiling(title, name, gm):
            return _whole(name, gm, inputs)
    kinds = len({part.kind for part in parts})
    with compiling(title, name, gm, f"{kinds} pieces of it for all {len(parts)}"):
        return Stitched(gm, parts, lambda part, given: _whole(name, part, given))


def _may_be_cut() -> bool:
    """Not where a backward graph is made, nor where CUDA graphs are: they count on the places of weights and state."""
    from torch._inductor import config

    return not torch.is_grad_enabled() and not config.triton.cudagraphs


def _whole(name: str, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Compile a graph as it is."""
    inputs = _distinct(inputs)
    compiled: Any
    if name == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        compiled = aot_eager(gm, inputs)
    else:
        from torch._inductor.compile_fx import compile_fx

        compiled = compile_fx(gm, inputs)
    return compiled  # type: ignore[no-any-return]  # compile_fx may also give files, but not here


def _distinct(inputs: list[Any]) -> list[Any]:
    """Fake tensors that stand for several inputs become one each: AOTAutograd takes one object for one tensor."""
    seen: set[int] = set()
    result = []
    for value in inputs:
        if isinstance(value, torch.Tensor) and id(value) in seen:
            with value.fake_mode:  # type: ignore[attr-defined]  # they are fake
                value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        seen.add(id(value))
        result.append(value)
    return result
