"""One Dynamo trace for many policies.

Dynamo's graph of a model is the same under every policy, and tracing it takes ten times as long as all that kvpass does
with it. Tests that compile one model for policy after policy ask for the fixture `one_trace`: calls of all compiled
models of one module then share its traces, and each compilation's own backend is given every graph that it needs, as
Dynamo gave it. Whatever else kvpass does is the real thing: rewriting, its proof, bindings, facade and watch.
"""

from __future__ import annotations

import itertools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from kvpass.model import dynamo

Backend = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


class Running:
    """Whose call is running: its backend, and what it made of each trace."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.made: dict[Trace, Callable[..., Any]] = {}


RUNNING: list[Running] = []


class Trace:
    """A graph as Dynamo captured it. Called, it runs as compiled by the backend of the call that is running."""

    def __init__(self, gm: fx.GraphModule, inputs: list[Any]) -> None:
        graph = fx.Graph()  # Dynamo empties the nodes' meta of its own when it has done
        graph.output(graph.graph_copy(gm.graph, {}))
        for old, new in zip(gm.graph.nodes, graph.nodes, strict=True):
            assert old.name == new.name
            new.meta = dict(old.meta)
        self.gm, self.inputs = fx.GraphModule(gm, graph), inputs
        self.gm.meta = dict(gm.meta)
        fakes = [node.meta.get("example_value") for node in graph.nodes]
        self.env = next((fake.fake_mode.shape_env for fake in fakes if hasattr(fake, "fake_mode")), None)
        self.context = torch._guards.TracingContext.try_get()

    def __call__(self, *args: Any) -> Any:
        running = RUNNING[-1]
        if self not in running.made:
            running.made[self] = self.compiled(running.backend)
        return running.made[self](*args)

    def compiled(self, backend: Backend) -> Callable[..., Any]:
        before = self.guards()
        with torch._guards.tracing(self.context):
            result = backend(self.gm, self.inputs)
        assert self.guards() == before, "Dynamo would have guarded what this backend asked; compile without one_trace"
        return result

    def guards(self) -> int:
        return 0 if self.env is None else len(self.env.guards)


setattr(Trace, dynamo.MARK, True)  # Dynamo asks for it: a compilation by kvpass
_NUMBERS = itertools.count()
_SHARED: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()


def isolated(backend: Backend, hooks: Any = None) -> Callable[..., Any]:
    """In the place of `kvpass.model.dynamo.isolated`: traces of a module are shared. hooks: guarded all the same."""
    running = Running(backend)

    def call(function: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module not in _SHARED:
            name = f"shared_call_{next(_NUMBERS)}"  # Dynamo remembers by it which sizes have changed
            code = dynamo._entry.__code__.replace(co_name=name)
            own = types.FunctionType(code, dynamo._entry.__globals__)
            _SHARED[module] = torch.compile(own, backend=Trace)
        RUNNING.append(running)
        try:
            return _SHARED[module](function, module, *args, **kwargs)
        finally:
            RUNNING.pop()

    return call
