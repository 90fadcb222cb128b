"""Decoders inside hosts that call them in their own ways: wrappers, copies, hooks, graph breaks, uncompiled parts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import plain


class Delegate(nn.Module):
    """Forward passes on; generate is the inner module's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)

    def generate(self, ids: Tensor, steps: int) -> Any:
        return run(self.inner, ids, steps)


class Nameless(nn.Module):
    """No forward at all: generate calls a module that lies in a plain list."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.kept = [inner]
        self.inner = inner

    def generate(self, ids: Tensor, steps: int) -> Any:
        return run(self.kept[0], ids, steps)


class Attributes(nn.Module):
    """Unknown attributes are the inner module's, as PEFT's are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
            return getattr(self.inner, name)

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


class ByForward(nn.Module):
    """Calls the inner module's forward, as engines do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner.forward(*args)

    def generate(self, ids: Tensor, steps: int) -> Any:
        return run(self.inner.forward, ids, steps)


def run(call: Callable[..., Any], ids: Tensor, steps: int) -> Any:
    """A prompt and some greedy tokens; the cache at the end."""
    with torch.no_grad():
        logits, cache = call(ids, None)
        for _ in range(steps):
            logits, cache = call(logits[:, -1:].argmax(-1), cache)
    return cache


def broken(block: nn.Module) -> None:
    """A graph break between two parts of a block."""
    inner = block.ff.forward

    def forward(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return inner(x)

    block.ff.forward = forward


def broken_inside(block: nn.Module) -> None:
    """A graph break between the write to the cache and the attention."""
    inner = block.core

    def core(*args: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return inner(*args)

    block.core = core


def uncompiled(block: nn.Module) -> None:
    """A block that Dynamo leaves alone."""
    block.forward = torch._dynamo.disable(block.forward)


def uncompiled_core(block: nn.Module) -> None:
    block.core = torch._dynamo.disable(block.core)


def hooked(block: nn.Module) -> None:
    block.ff.register_forward_hook(lambda *_: None)


FAULTS: dict[str, Callable[[nn.Module], None]] = {
    "break": broken,
    "break inside": broken_inside,
    "uncompiled": uncompiled,
    "uncompiled core": uncompiled_core,
    "hook": hooked,
}
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "delegate": Delegate,
    "nameless": Nameless,
    "attributes": Attributes,
    "by forward": ByForward,
    "torch.compile": lambda m: torch.compile(m, backend="eager"),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda m: m,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
}
ENTRIES: dict[str, Callable[[Any, Tensor, int], Any]] = {
    "call": lambda m, ids, steps: run(m, ids, steps),
    "forward": lambda m, ids, steps: run(m.forward, ids, steps),
    "generate": lambda m, ids, steps: m.generate(ids, steps),
    "inner": lambda m, ids, steps: run(m.inner, ids, steps),
}


def decoder() -> nn.Module:
    return plain.Decoder().eval()
