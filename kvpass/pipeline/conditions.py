"""Conditions on sizes as arguments, `is_causal=t > 1`: Dynamo would break the graph at each; here it decides them.

Once a size is symbolic, so is a condition on it, and torch's functions take no symbolic bool: Dynamo gives up at the
call, and K and V leave one graph to be attended to in another. An `if t > 1:` it decides, with a guard. The same is
done for such arguments, in compilations by a backend of kvpass alone.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from kvpass.pipeline.patched import Patch

MARK = "_decides_conditions"
"""Attribute of backends in whose compilations conditions are decided."""

_INNER = ("compiler_fn", "_torchdynamo_orig_backend", "__wrapped__")
"""What torch wraps around a backend, and where it keeps it."""

_NUMBERS = ("dropout_p",)
"""Arguments that decide what is computed as a condition does, though they are numbers."""


def decided() -> AbstractContextManager[None]:
    """While calls of compiled models run."""
    return _PATCH


_kept: list[None] = []


def decided_from_now_on() -> None:
    """For the spelling `torch.compile(backend="kvpass")`, whose calls nobody surrounds."""
    if not _kept:
        _kept.append(None)
        _PATCH.begin()


def _deciding(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        value = getattr(self, "value", None)
        if isinstance(value, types.BuiltinFunctionType) and _is_ours(tx):
            args = [_decide(tx, one) for one in args]
            kwargs = {name: _decide(tx, one, name in _NUMBERS) for name, one in kwargs.items()}
        return original(self, tx, args, kwargs)

    return call_function


_PATCH = Patch("torch._dynamo.variables.torch", "TorchInGraphFunctionVariable.call_function", _deciding)


def _is_ours(tx: Any) -> bool:
    """Is this a compilation by a backend of kvpass?"""
    backend = getattr(getattr(tx, "output", None), "compiler_fn", None)
    while backend is not None and not getattr(backend, MARK, False):
        within = getattr(backend, "__dict__", {})
        backend = next((within[name] for name in _INNER if within.get(name) is not None), None)
    return backend is not None


def _decide(tx: Any, given: Any, number: bool = False) -> Any:
    """What Dynamo knows of an argument: of a condition its value in this call, with a guard; else as it is."""
    said = getattr(given, "sym_num", None)
    kinds = (torch.SymBool, torch.SymInt, torch.SymFloat) if number else (torch.SymBool,)
    if not isinstance(said, kinds) or not said.node.has_hint():  # what depends on data Dynamo cannot decide
        return given
    from torch._dynamo.variables import ConstantVariable

    return ConstantVariable.create(given.evaluate_expr(tx.output))
