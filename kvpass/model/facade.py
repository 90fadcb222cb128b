"""The compiled model: the same modules as the original's, entered by another door.

A facade is an object of the model's class that shares its attributes: there is one model, with two ways to call it, so
what is changed on either (adapters, weights, hooks, modules, modes) is changed on both. Calls of the facade, and of any
module that is reached through it, go to kvpass; the modules themselves know nothing.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch

from kvpass.errors import KVPassError
from kvpass.runtime.wrapped import opened

_get = object.__getattribute__
_set = object.__setattr__


class Facade:
    """Mixed into a subclass of a module's class, in front of it.

    Attributes:
        _kvpass_real: the module that this is a facade of.
        _kvpass_compilation: runs its calls.
    """

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing: a facade is no new kind of model, to be registered or checked."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Whoever makes another one of this class (`type(model)(config)`) gets the model's own."""
        return cls.__mro__[2](*args, **kwargs)

    @property  # type: ignore[misc]  # as unittest.mock does: isinstance sees the model's class
    def __class__(self) -> Any:
        return type(_get(self, "_kvpass_real"))

    @property
    def kvpass(self) -> Any:
        """The backend, with the records of its graphs."""
        return _get(self, "_kvpass_compilation").backend

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_kvpass") or name in ("__dict__", "__class__"):
            return super().__getattribute__(name)
        if name == "_modules":
            return _Children(self)
        value = super().__getattribute__(name)
        if name == "forward":
            return _door(self, value)
        if name == "generate" and callable(value):
            return _checked(self, value)
        return _seen(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return _seen(self, name, super().__getattr__(name))  # type: ignore[misc]  # nn.Module has one

    def __setattr__(self, name: str, value: Any) -> None:
        compilation, real = _get(self, "_kvpass_compilation"), _get(self, "_kvpass_real")
        value = bare(value)
        own = vars(real)
        holders = own, own.get("_buffers", {})
        if not any(compilation.state.set(holder, name, value) for holder in holders):
            super().__setattr__(name, value)
            for holder in holders:
                compilation.state.given(holder, name)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not say what it gives
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        real = _get(self, "_kvpass_real")
        args, kwargs = opened(args, kwargs)
        return _get(self, "_kvpass_compilation").run(real, (torch.nn.Module._call_impl, real), args, kwargs)

    def _kvpass_attributes(self) -> dict[str, Any]:
        """The module's attributes and buffers as the compiled model has them, for reports."""
        own = vars(_get(self, "_kvpass_real"))
        return {name: _seen(self, name, value) for name, value in {**own, **own.get("_buffers", {})}.items()}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Nothing but a warning: kvpass' own compiler is chosen by `kvpass.compile(model, inner=...)`."""
        what = "this model is compiled by kvpass already, so compile() does nothing: kvpass.compile(model, inner=...) "
        warnings.warn(what + "chooses who compiles the rewritten graphs", UserWarning, stacklevel=2)

    def __copy__(self) -> Any:
        return _get(self, "_kvpass_compilation").again(copy.copy(_get(self, "_kvpass_real")))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _get(self, "_kvpass_compilation").again(copy.deepcopy(_get(self, "_kvpass_real"), memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _get(self, "_kvpass_compilation").reduced(_get(self, "_kvpass_real"))


class _Children(dict[str, Any]):
    """A module's submodules as facades; what is set goes to the module."""

    def __init__(self, facade: Any) -> None:
        self.real = vars(_get(facade, "_kvpass_real"))["_modules"]
        super().__init__({name: _seen(facade, name, module) for name, module in self.real.items()})

    def __setitem__(self, name: str, module: Any) -> None:
        self.real[name] = bare(module)
        super().__setitem__(name, module)

    def __delitem__(self, name: str) -> None:
        del self.real[name]
        super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        self.real.pop(name, *default)
        return super().pop(name, *default)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, module in dict(*args, **kwargs).items():
            self[name] = module

    def clear(self) -> None:
        self.real.clear()
        super().clear()


def facade_of(real: torch.nn.Module, compilation: Any) -> Any:
    """An object of the module's class around the module's own attributes."""
    cls: Any = type(real)
    result: Any = object.__new__(_facade_class(cls))
    _set(result, "_kvpass_real", real)
    _set(result, "_kvpass_compilation", compilation)
    _set(result, "__dict__", vars(real))
    return result


def bare(value: Any) -> Any:
    """A module itself, for its facade; other values as they are."""
    return _get(value, "_kvpass_real") if issubclass(type(value), Facade) else value


def uncompiled(model: Any) -> Any:
    """The module itself, if it was given compiled, by torch or by kvpass."""
    while isinstance(getattr(model, "_orig_mod", None), torch.nn.Module):
        model = model._orig_mod
    return bare(model)


@functools.cache
def _facade_class(cls: Any) -> Any:
    same = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    try:
        return type(cls)(cls.__name__, (Facade, cls), {**same, "__slots__": ("_kvpass_real", "_kvpass_compilation")})
    except TypeError as error:
        raise KVPassError(
            f"a {cls.__name__} cannot be compiled: its class allows no subclass ({error})",
            hint="wrap it in an nn.Module whose forward calls it, and compile that",
        ) from error


def _seen(facade: Any, name: str, value: Any) -> Any:
    """An attribute as the compiled model has it: submodules as facades, its own values of what its calls change."""
    compilation = _get(facade, "_kvpass_compilation")
    if compilation.state.own:
        own = vars(_get(facade, "_kvpass_real"))
        value = compilation.state.get(own, name, value)
        value = compilation.state.get(own.get("_buffers", own), name, value)
    if isinstance(value, torch.nn.Module):
        return compilation.facade(value)
    if type(value) in (list, tuple) and any(isinstance(part, torch.nn.Module) for part in value):
        return type(value)(_seen(facade, "", part) for part in value)
    if type(value) is dict and any(isinstance(part, torch.nn.Module) for part in value.values()):
        return {key: _seen(facade, "", part) for key, part in value.items()}
    return value


def _door(facade: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled.forward(...)`: no hooks, but kvpass."""
    compilation, real = _get(facade, "_kvpass_compilation"), _get(facade, "_kvpass_real")
    method = getattr(forward, "__self__", None) is facade
    function = (forward.__func__, real) if method else (forward,)  # type: ignore[attr-defined]  # a method has one

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not say what it gives
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compilation.run(real, function, *opened(args, kwargs))

    return cast(Callable[..., Any], call)


def _checked(facade: Any, generate: Callable[..., Any]) -> Callable[..., Any]:
    """`generate`, which refuses at once what compressed caches cannot do yet, and transformers' also a history that is
    not the cache's: others may take new tokens alone.
    """
    from kvpass.model.asked import by_name
    from kvpass.model.history import check_history, note_history
    from kvpass.model.speculative import drafts_of
    from kvpass.model.unserved import refuse_unserved

    theirs = str(getattr(generate, "__module__", "")).startswith("transformers.")

    @functools.wraps(generate)
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = opened(args, kwargs)
        compilation, asked = _get(facade, "_kvpass_compilation"), by_name(generate, args, kwargs)
        refuse_unserved(compilation.backend.policy, facade, asked)
        if theirs:
            check_history(facade, args, asked)
        with drafts_of(compilation, facade, args, asked):
            result = generate(*args, **kwargs)
        if theirs:
            note_history(facade, asked, result)
        return result

    return call
