"""A host's cache in a wrapper, and the host's cache again at a model's door."""

from __future__ import annotations

from typing import Any


class Wrapped:
    """What `kvpass.Cache` is to the rooms below it.

    Attributes:
        host: the cache as its host has it, shared with it.
    """

    def __init__(self, host: Any) -> None:
        self.host = host


def opened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the host's own caches in the place of wrappers: themselves, if there are none."""
    if any(isinstance(one, Wrapped) for one in args):
        args = tuple(one.host if isinstance(one, Wrapped) else one for one in args)
    if any(isinstance(one, Wrapped) for one in kwargs.values()):
        kwargs = {name: one.host if isinstance(one, Wrapped) else one for name, one in kwargs.items()}
    return args, kwargs
