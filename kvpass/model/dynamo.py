"""Dynamo for one compiled model alone: a code object, a limit and an error of its own.

Dynamo keeps its graphs by code object and counts them there, for all models of a class together. Past the limit it runs
the original, in silence, and a compressed cache would meet a model that knows nothing of it.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import itertools
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from kvpass.errors import RecompileError
from kvpass.model.changing import changing_is_dynamic
from kvpass.model.hooks import Hooks, guards_of_hooks, looked_for
from kvpass.pipeline.conditions import MARK, decided
from kvpass.pipeline.progress import tracing

LIMIT = 64
"""Graphs for each frame of one compiled model before kvpass raises."""

_WITHIN_A_CALL = {
    "recompile_limit": LIMIT,
    "accumulated_recompile_limit": 1 << 20,  # counts all models of a class: says nothing of this one
    "fail_on_recompile_limit_hit": True,
    "skip_nnmodule_hook_guards": False,  # hooks that come or go after the first call are seen
    "side_effect_replay_policy": "silent",  # else a stack trace for each cache layer, for a log nobody asked for
}
"""Settings of Dynamo while it is called; those that a torch does not have are left out."""

_NUMBERS = itertools.count()


def _entry(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def isolated(backend: Callable[..., Any], hooks: Hooks | None = None) -> Callable[..., Any]:
    """`call(function, *args, **kwargs)`, compiled by `backend`, that shares no graph and no limit with anybody.

    Graphs die with the result, and with the backend, which the caller keeps. Run it inside `limits()`; if it is given
    `hooks`, right after they were found to be none.
    """
    code = _entry.__code__.replace(co_name=f"kvpass_call_{next(_NUMBERS)}")
    own = types.FunctionType(code, _entry.__globals__)
    if hooks is not None:
        looked_for(own, hooks)
    known = inspect.signature(torch.compile).parameters  # torch before 2.13 cannot isolate frames behind graph breaks
    more: dict[str, Any] = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    compile: Any = torch.compile
    compiled: Callable[..., Any] = compile(own, backend=_Entrance(backend), **more)
    return compiled


class _Entrance:
    """A backend for Dynamo, which keeps every one that it has seen; the real one, with its graphs, may go."""

    def __init__(self, backend: Callable[..., Any]) -> None:
        self.backend = weakref.ref(backend)

    def __call__(self, gm: Any, example_inputs: Any) -> Any:
        backend = self.backend()
        assert backend is not None, "its owner calls it"
        return backend(gm, example_inputs)


setattr(_Entrance, MARK, True)


@contextmanager
def limits() -> Iterator[None]:
    """Dynamo's settings for calls of `isolated`; the caller's come back afterwards.

    Raises:
        RecompileError: the limit was hit; it names Dynamo's reason for the last graph.
    """
    import torch._dynamo

    try:
        with _SETTINGS.put(torch._dynamo.config), tracing(), decided(), changing_is_dynamic(), guards_of_hooks():
            yield
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise _too_many() from error


class _Settings:
    """Dynamo's settings during calls. Where they are the process's (torch before 2.13), those of before come back when
    no thread is in a call any more; else each thread has its own.
    """

    def __init__(self) -> None:
        self.lock, self.calls = threading.Lock(), 0
        self.before: dict[str, Any] = {}

    @contextmanager
    def put(self, config: Any) -> Iterator[None]:
        if _are_of_threads(config):
            before = _exchanged(config, _WITHIN_A_CALL)
            try:
                yield
            finally:
                _set(config, before)
            return
        with self.lock:
            self.calls += 1
            if self.calls == 1:
                self.before = _exchanged(config, _WITHIN_A_CALL)
        try:
            yield
        finally:
            with self.lock:
                self.calls -= 1
                if not self.calls:
                    _set(config, self.before)


_SETTINGS = _Settings()


def _exchanged(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Set what a torch has of these, and give what it was. (The config's own patch() takes ten times as long.)"""
    before = {name: getattr(config, name) for name in values if _knows(config, name)}
    _set(config, {name: values[name] for name in before})
    return before


def _set(config: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


@functools.cache
def _knows(config: Any, name: str) -> bool:
    """Whether this torch has a setting."""
    return hasattr(config, name)


@functools.cache
def _are_of_threads(config: Any) -> bool:
    """Whether what one thread sets is not seen by others."""
    before = _exchanged(config, {"recompile_limit": -1})
    try:
        return bool(contextvars.Context().run(getattr, config, "recompile_limit") != -1)
    finally:
        _set(config, before)


def _too_many() -> RecompileError:
    from torch._dynamo.utils import get_compilation_metrics

    said = next((str(m.recompile_reason) for m in reversed(get_compilation_metrics()) if m.recompile_reason), "")
    cause = " ".join(said.split("  #")[0].split(":", 1)[-1].split()) or "not told"
    return RecompileError(
        f"the model was compiled more than {LIMIT} times",
        where=f"Dynamo's last reason for another graph: {cause}",
        hint=f"this changes from call to call: {_advice(cause)}",
    )


def _advice(cause: str) -> str:
    if "_buffers[" in cause or "_parameters[" in cause:
        return "a tensor of a module that somebody else than the model replaces: set it on the compiled model instead"
    if "size" in cause or "shape" in cause or "stride" in cause:
        return "pad batches and prompts to fewer shapes"
    if "training" in cause or "grad" in cause:
        return "call the model always in eval mode under torch.no_grad()"
    if "hooks" in cause:
        return "do not add and remove hooks between calls"
    return (
        "keep it constant, make it a tensor, or compile a model for each value; an attribute of a module that the host "
        "counts must be set on the compiled model, not on the original"
    )
