"""How a user names the backend: as an object, or by its name and options."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import fx

from kvpass.errors import KVPassError, PolicyError
from kvpass.pipeline.arguments import check_options, checked_patterns
from kvpass.pipeline.compose import Backend
from kvpass.pipeline.conditions import MARK
from kvpass.pipeline.inner_options import checked_inner
from kvpass.pipeline.refusal import Refusal
from kvpass.policy.policy import Policy


def backend(
    policy: str | Policy | dict[str, Any] = "kvpass",
    budget: int | float | str | None = None,
    *,
    inner: str | Mapping[str, Any] = "inductor",
    strict: bool = True,
    debug: bool | str | PathLike[str] | None = None,
    verify: bool = False,
    patterns: Any = None,
    mode: str = "default",
) -> Backend:
    """A backend object for `torch.compile(model, backend=kvpass.backend("h2o", 0.2))`. Arguments as for
    `kvpass.compile`.

    Raises:
        PolicyError: bad policy, budget or option.
    """
    from kvpass.debug import debug_folder

    check_options(strict=strict, debug=debug, verify=verify, mode=mode)
    patterns, checked = checked_patterns(patterns), Policy.load(policy).with_budget(budget)
    return Backend(checked, checked_inner(inner), strict, debug_folder(debug), verify, patterns, mode)


_FROM_OPTIONS: dict[str, Backend] = {}


def from_options(
    gm: fx.GraphModule, example_inputs: list[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Any:
    """Entry point of `torch.compile(model, backend="kvpass", options={"policy": ..., "budget": ...})`.

    Raises:
        PolicyError: unknown option, with the valid ones (when the compiled model is called).
    """
    given = (options or {}) | ({"mode": mode} if mode is not None else {})
    valid = ("policy", "budget", "inner", "strict", "debug", "verify", "mode")
    try:
        unknown = sorted(set(given) - set(valid))
        if unknown:
            raise PolicyError(f"unknown option {unknown[0]!r}", hint=f"options are {', '.join(valid)}")
        key = repr(sorted(given.items()))
        if key not in _FROM_OPTIONS:
            _FROM_OPTIONS[key] = backend(**given)
        return _FROM_OPTIONS[key](gm, example_inputs)
    except KVPassError as error:
        return Refusal(error)


setattr(from_options, MARK, True)
