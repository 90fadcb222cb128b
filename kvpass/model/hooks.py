"""Hooks that come to a model's modules: looked for once a call, instead of in each empty dictionary by a guard.

A module has six dictionaries for its hooks, and Dynamo, asked to see hooks that come, guards each that is empty: a
third of all its guards for a model, far apart in memory. One look over those of forward hooks says as much: the two
that say which hooks take keyword arguments are empty with them, and hooks of backward passes are none of a graph
without gradients. It comes right before the guards of the call's own frame; all frames behind it keep theirs, as do
modules that the model holds beside its own, and calls of models that have hooks.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from itertools import chain
from operator import itemgetter
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch

from kvpass.pipeline.patched import Patch

_FORWARD = "_forward_hooks", "_forward_pre_hooks"
_SAID_WITH = "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"

_submodules, _hooks = itemgetter("_modules"), itemgetter(*_FORWARD)


class Hooks:
    """Those of a tree of modules, each known by the dictionary of its attributes."""

    def __init__(self, root: torch.nn.Module) -> None:
        self.root = root
        self._modules: list[dict[str, Any]] = []
        self._parents: list[dict[str, Any]] = []
        self._noted: list[dict[str, Any]] | None = None
        self._places: dict[int, tuple[dict[str, Any], str]] = {}

    def any(self) -> bool:
        """Whether any module has hooks now, or is of a kind that keeps them elsewhere."""
        if [*map(_submodules, self._parents)] != self._noted and not self._look():
            return True
        return any(chain.from_iterable(map(_hooks, self._modules)))

    def __contains__(self, one: Any) -> bool:
        """Is it a dictionary of hooks that a look at these modules says something of?"""
        own, name = self._places.get(id(one), ({}, ""))
        backward = name.startswith("_backward") and torch.is_grad_enabled()
        return own.get(name) is one and not backward

    def _look(self) -> bool:
        """Go through the tree anew. False if not all modules are as torch makes them, e.g. scripted ones."""
        modules, names = [vars(module) for module in self.root.modules()], (*_FORWARD, *_SAID_WITH)
        if not all(isinstance(own.get(name), dict) for own in modules for name in ("_modules", *names)):
            return False
        self._modules, self._parents = modules, [own for own in modules if own["_modules"]]
        self._noted = [dict(own["_modules"]) for own in self._parents]
        self._places = {id(own[name]): (own, name) for own in modules for name in names}
        return True


_LOOKED_FOR: WeakKeyDictionary[types.CodeType, ref[Hooks]] = WeakKeyDictionary()
"""By the code whose calls are preceded by a look: that of one compiled model, which no other runs."""


def looked_for(function: types.FunctionType, hooks: Hooks) -> None:
    """From now on nobody calls a function before `hooks.any()` has said no."""
    _LOOKED_FOR[function.__code__] = ref(hooks)


def guards_of_hooks() -> Patch:
    """While calls of compiled models run."""
    return _PATCH


def _unless_looked_for(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def EMPTY_NN_MODULE_HOOKS_DICT(self: Any, guard: Any) -> Any:  # Dynamo knows guards by this name
        code: Any = getattr(self, "f_code", None)
        known = _LOOKED_FOR.get(code) if code is not None else None
        hooks = known() if known is not None else None
        return None if hooks is not None and self.get(guard) in hooks else original(self, guard)

    return EMPTY_NN_MODULE_HOOKS_DICT


_PATCH = Patch("torch._dynamo.guards", "GuardBuilder.EMPTY_NN_MODULE_HOOKS_DICT", _unless_looked_for)
