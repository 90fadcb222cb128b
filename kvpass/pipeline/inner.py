"""Handing a graph to the inner compiler: whole, or one layer for all layers that are alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from kvpass.pipeline.inner_options import Inner
from kvpass.pipeline.progress import compiling


def compile_inner(
    inner: Inner,
    gm: fx.GraphModule,
    inputs: list[Any],
    title: str = "a graph",
    real: Sequence[Any] = (),
    begins: bool = False,
) -> Callable[..., Any]:
    """Compile a traced graph.

    Args:
        inputs: fake inputs with symbolic sizes, one for each placeholder. Real ones would freeze the sizes.
        title: what the user is told is being compiled.
        real: the call's own inputs, for the first placeholders: the parameters among them are what freezing freezes.
        begins: the graph reads prompts.

    Raises:
        ModelError: weights are to be frozen where gradients are on.
    """
    if inner.name == "eager":
        return gm.forward
    from kvpass.pipeline.regions import regions

    weights = _frozen_weights(inner, gm, real)
    parts = regions(gm) if _may_be_cut(inner) else None
    if parts is None:
        with compiling(title, inner.name, gm):
            return _frozen_whole(inner, gm, inputs, weights, begins) if weights else _whole(inner, gm, inputs)
    from kvpass.pipeline.stitch import Stitched

    kinds = len({part.kind for part in parts})
    pieces = f"{kinds} pieces of it for all {len(parts)}" if not weights else f"{len(parts)} pieces of it"
    with compiling(title, inner.name, gm, pieces):
        stitched = Stitched(gm, parts, lambda part, given: _whole(inner, part, given), weights)
    if not weights:
        return stitched
    from kvpass.pipeline.frozen import Checked

    return Checked(stitched, _places(gm, weights), begins)


def _may_be_cut(inner: Inner) -> bool:
    """Not where a backward graph is made, nor where CUDA graphs are: they count on the places of weights and state."""
    from torch._inductor import config

    return not torch.is_grad_enabled() and not config.triton.cudagraphs


def _frozen_weights(inner: Inner, gm: fx.GraphModule, real: Sequence[Any]) -> dict[fx.Node, torch.Tensor]:
    if not inner.freezes:
        return {}
    from kvpass.pipeline.frozen import weights_in

    return weights_in(gm, real)


def _places(gm: fx.GraphModule, weights: dict[fx.Node, torch.Tensor]) -> dict[int, torch.Tensor]:
    inputs = gm.graph.find_nodes(op="placeholder")
    return {at: weights[node] for at, node in enumerate(inputs) if node in weights}


def _frozen_whole(
    inner: Inner, gm: fx.GraphModule, inputs: list[Any], weights: dict[fx.Node, torch.Tensor], begins: bool
) -> Callable[..., Any]:
    from kvpass.pipeline.frozen import Checked, with_constants, without

    places = _places(gm, weights)
    others = [one for at, one in enumerate(inputs) if at not in places]
    return Checked(without(_whole(inner, with_constants(gm, places), others), places, len(inputs)), places, begins)


def _whole(inner: Inner, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Compile a graph as it is."""
    inputs = _distinct(inputs)
    compiled: Any
    if inner.name == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        compiled = aot_eager(gm, inputs)
    else:
        from torch._inductor.compile_fx import compile_fx

        compiled = compile_fx(gm, inputs, config_patches=inner.patches or None)
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
