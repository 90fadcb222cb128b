"""Whether a node of a graph is computed under autocast: of the caller, or inside the model."""

from __future__ import annotations

import torch
from torch import fx

from kvpass.graph.calls import argument, call_name, example


def autocast_of(node: fx.Node) -> str | None:
    """`called under torch.autocast("cpu", torch.bfloat16)` in words; None where no autocast is on.

    The caller's is on while Dynamo compiles the graph; the model's own begin and end in it.
    """
    value = example(node)
    device = value.device.type if isinstance(value, torch.Tensor) else "cpu"
    ambient = (torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
    stack: list[tuple[fx.Node | None, torch.dtype | None, bool]] = [(None, *ambient)]
    for current in node.graph.nodes:
        if current is node:
            break
        if call_name(current) == "_enter_autocast" and argument(current, 0, "device_type") == device:
            stack.append((current, argument(current, 1, "dtype"), argument(current, 2, "enabled", True)))
        elif call_name(current) == "_exit_autocast":
            stack = [entry for entry in stack if entry[0] is not current.args[0]]
    begun, dtype, enabled = stack[-1]
    if not enabled:
        return None
    whose = "called" if begun is None else "computed"
    return f'{whose} under torch.autocast("{device}", {dtype or torch.get_autocast_dtype(device)})'
