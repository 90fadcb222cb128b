"""The inner compiler as a value: its name, and options of its own, checked against what it takes."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvpass.errors import PolicyError

INNER = ("inductor", "aot_eager", "eager")

REFUSED = {
    "triton.cudagraphs": "kvpass' state changes in place, so Inductor would skip them: mode='reduce-overhead' records "
    "steps as CUDA graphs",
    "freezing_discard_parameters": "other graphs of the model read its parameters, and caches know their model by them",
}
"""Options of Inductor that cannot work here, and what to do instead."""


@dataclass(frozen=True)
class Inner:
    """Who compiles the rewritten graph, and how. Equal options are equal values, in whatever order they were given.

    Attributes:
        name: one of `INNER`.
        options: (name, value) of each option, sorted; of `inductor` names of `torch._inductor.config`.
    """

    name: str = "inductor"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def patches(self) -> dict[str, Any]:
        """The options, as Inductor takes them."""
        return dict(self.options)

    @property
    def freezes(self) -> bool:
        """Whether weights are made constants of the compiled code."""
        return self.patches.get("freezing") is True

    def __str__(self) -> str:
        said = ", ".join(f"{name}={value!r}" for name, value in self.options)
        return f"{self.name}({said})" if said else self.name


EAGER = Inner("eager")


def checked_inner(given: Any) -> Inner:
    """The inner compiler that a user names: a word, or a mapping with its `name` (by default `inductor`) and options.

    Raises:
        PolicyError: no such compiler or option, a value of another type, or an option that cannot work under kvpass.
    """
    if isinstance(given, Inner):
        return given
    if not isinstance(given, Mapping):
        return Inner(_checked_name(given))
    name = _checked_name(given.get("name", "inductor"))
    options = {key: value for key, value in given.items() if key != "name"}
    if options and name != "inductor":
        hint = f"inner={name!r}, or options of inner={{'name': 'inductor', ..}}"
        raise PolicyError(f"{name} takes no options, but {next(iter(options))!r} was given", where="inner=", hint=hint)
    return Inner(name, tuple(sorted(_checked_option(key, value) for key, value in options.items())))


def _checked_name(given: Any) -> str:
    if isinstance(given, str) and given in INNER:
        return given
    from kvpass.pipeline.arguments import described

    near = difflib.get_close_matches(str(given).lower(), INNER, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    hint += f"one of {', '.join(INNER)}"
    raise PolicyError(f"no inner compiler {described(given)}", where="inner=", hint=hint)


def _checked_option(given: Any, value: Any) -> tuple[str, Any]:
    """(name, value) of an option of Inductor."""
    from torch._inductor import config

    known: Any = config.get_config_copy()
    name = given.replace("-", "_") if isinstance(given, str) else ""
    where = f"inner={{{given!r}: ..}}"
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        hint += "torch._inductor.list_options() has the names"
        raise PolicyError(f"inductor has no option {given!r}", where=where, hint=hint)
    if name in REFUSED:
        raise PolicyError(f"inductor's option {name!r} does not work under kvpass", where=where, hint=REFUSED[name])
    kind = config.get_type(name) if hasattr(config, "get_type") else type(known[name])
    if not _is(value, kind) or not _hashable(value):
        from kvpass.pipeline.arguments import described

        what = f"bad value {described(value)} for inductor's option {name!r}"
        hint = f"give {_named(kind)}; it is {known[name]!r} by default"
        if not _hashable(value):
            hint = f"set torch._inductor.config.{name} before the model is called: here a value must be hashable"
        raise PolicyError(what, where=where, hint=hint)
    return name, value


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, as annotations write it. True and False are no numbers, a whole number is a float;
    of an option without a type everything is.
    """
    if kind is Any or kind is type(None):
        return True
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(value is None if part is type(None) else _is(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin is not None:
        return isinstance(value, origin)
    if isinstance(value, bool) and kind in (int, float):
        return False
    return not isinstance(kind, type) or isinstance(value, (int, float) if kind is float else kind)


def _named(kind: Any) -> str:
    if kind is bool:
        return "True or False"
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    return f"a {kind.__name__}" if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
