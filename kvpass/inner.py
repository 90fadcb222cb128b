"""Handing a graph to the inner compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

INNER = ("inductor", "aot_eager", "eager")


def compile_inner(name: str, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Compile a traced graph.

    Args:
        name: one of `INNER`.
        inputs: fake inputs with symbolic sizes, one for each placeholder. Real ones would freeze the sizes.
    """
    compiled: Any = gm.forward
    if name == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        compiled = aot_eager(gm, inputs)
    elif name == "inductor":
        from torch._inductor.compile_fx import compile_fx

        compiled = compile_fx(gm, inputs)
    return compiled  # type: ignore[no-any-return]
