"""Real Dynamo graphs for tests: capture what a function or module looks like to a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from kvpass.patterns import DEFAULT
from torch import fx

from kvpass.graph.calls import call_name
from kvpass.sites.scan import scan
from kvpass.sites.table import SiteTable


def capture_all(call: Callable[..., Any], *args: Any, **kwargs: Any) -> list[fx.GraphModule]:
    """The graphs that Dynamo makes of one call, in order."""
    graphs: list[fx.GraphModule] = []

    def record(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(call, backend=record)(*args, **kwargs)
    return graphs


def capture(call: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.GraphModule:
    """The only graph of one call."""
    (gm,) = capture_all(call, *args, **kwargs)
    return gm


def table(call: Callable[..., Any], *args: Any, **kwargs: Any) -> SiteTable:
    """The site table of the only graph of one call."""
    return scan(capture(call, *args, **kwargs), DEFAULT)


def outcome(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """One word for a scan: the phase of the only site, the reasons of the declined ones, or `untouched`."""
    found = table(call, *args, **kwargs)
    words = [site.phase.value for site in found] + sorted({d.reason.value for d in found.declined})
    return " ".join(words) or "untouched"


def node(gm: fx.GraphModule, name: str, at: int = 0) -> fx.Node:
    """The `at`-th node that calls `name` (canonical)."""
    return [n for n in gm.graph.nodes if call_name(n) == name][at]


def dynamic(tensor: torch.Tensor, *dims: int) -> torch.Tensor:
    """Mark dimensions as changing from call to call."""
    for dim in dims:
        torch._dynamo.mark_dynamic(tensor, dim)
    return tensor
