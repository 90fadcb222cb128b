"""Attributes of modules that calls change: Dynamo may make symbols of them, as it does of all that is no module's.

Dynamo takes numbers and registered buffers of a module for constants, and compiles a graph for each value of a counter
and each length of a cache that is rebound. Its settings can only turn that off for all of them, and it remembers sizes
by line of code, so that head counts and weights of a second model of the same class would become symbols too. What a
model changes is known after its first call (`runtime/host_state.py`): only that follows the general rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kvpass.pipeline.patched import Patch
from kvpass.runtime.active import current


@contextmanager
def changing_is_dynamic() -> Iterator[None]:
    """While calls of compiled models run."""
    with _NUMBERS, _TENSORS:
        yield


def _is_changed(source: Any) -> bool:
    """Does a value hang on an attribute that calls of the running model change?"""
    call = current()
    names = call.owner.state.names if call is not None else ()
    while names and source is not None:
        if getattr(source, "member", None) in names or _index(source) in names:
            return True
        source = getattr(source, "base", None)
    return False


def _index(source: Any) -> str:
    """The name that a source looks up, in `_buffers['ck']`."""
    found = getattr(source, "index", None)
    return found if isinstance(found, str) else ""


def _numbers(original: Callable[..., Any]) -> Callable[..., Any]:
    def is_int_specialization_case(value: Any, source: Any) -> Any:
        return original(value, source) and not (_is_local(source) and _is_changed(source))

    return is_int_specialization_case


def _is_local(source: Any) -> bool:
    return bool(getattr(getattr(source, "guard_source", None), "is_local", lambda: False)())


def _tensors(original: Callable[..., Any]) -> Callable[..., Any]:
    def tensor_always_has_static_shape(tensor: Any, is_tensor: Any, tensor_source: Any, *more: Any) -> Any:
        found = original(tensor, is_tensor, tensor_source, *more)
        free = is_tensor and isinstance(tensor, torch.Tensor) and not isinstance(tensor, torch.nn.Parameter)
        return (False, None) if found[0] and free and _is_changed(tensor_source) else found

    return tensor_always_has_static_shape


_BUILDER = "torch._dynamo.variables.builder"
_NUMBERS = Patch(_BUILDER, "is_int_specialization_case", _numbers)
_TENSORS = Patch(_BUILDER, "tensor_always_has_static_shape", _tensors)
