"""Whether a node of a graph is computed under autocast: of the caller, or inside the model."""

from __future__ import annotations

import torch
from torch import fx
from torch.amp import autocast_mode

from kvpass.graph.calls import argument, example

_ENTER, _EXIT = autocast_mode._enter_autocast, autocast_mode._exit_autocast


def _marks(node: fx.Node) -> list[fx.Node]:
    """Where an autocast of the model begins or ends above a node, in order; graphs know their nodes by target."""
    found = [n for target in (_ENTER, _EXIT) for n in node.graph.find_nodes(op="call_function", target=target)]
    return sorted(n for n in found if n < node)


def autocast_of(node: fx.Node) -> str | None:
    """`called under torch.autocast("cpu", torch.bfloat16)` in words; None where no autocast is on.

    The caller's is on while Dynamo compiles the graph; the model's own begin and end in it.
    """
    value = example(node)
    device = value.device.type if isinstance(value, torch.Tensor) else "cpu"
    ambient = (torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
    stack: list[tuple[fx.Node | None, torch.dtype | None, bool]] = [(None, *ambient)]
    for current in _marks(node):
        if current.target is _ENTER and argument(current, 0, "device_type") == device:
            stack.append((current, argument(current, 1, "dtype"), argument(current, 2, "enabled", True)))
        elif current.target is _EXIT:
            stack = [entry for entry in stack if entry[0] is not current.args[0]]
    begun, dtype, enabled = stack[-1]
    if not enabled:
        return None
    whose = "called" if begun is None else "computed"
    return f'{whose} under torch.autocast("{device}", {dtype or torch.get_autocast_dtype(device)})'
