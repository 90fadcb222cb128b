"""Calls that are broken off: an error from inside kvpass' kernels, at the n-th function that is entered there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

ERRORS: dict[str, tuple[type[BaseException], tuple[str, ...]]] = {
    "an interrupt": (KeyboardInterrupt, ("/kernels/", "/kvpass/runtime/")),
    "no memory": (torch.OutOfMemoryError, ("/kernels/",)),
    "a scorer": (ZeroDivisionError, ("/kernels/rank/",)),
}
"""What is raised, and in which folders."""


class Fault:
    """Whether it happened."""

    happened = False


BEGINS = "runtime/bind.py", "__call__"
"""The function whose body may be broken off: of a graph that is compiled, and with everything that it needs."""


@contextmanager
def broken_off(kind: str, after: int) -> Iterator[Fault]:
    """Raise in the body of the `with`, when so many functions have been entered; not at all if there are fewer."""
    error, folders = ERRORS[kind]
    fault, left, inside, before = Fault(), after, 0, sys.getprofile()

    def entered(frame: Any, event: str, _: Any) -> None:
        nonlocal left, inside
        if event not in ("call", "return"):
            return
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if name == BEGINS[1] and file.endswith(BEGINS[0]):
            inside += 1 if event == "call" else -1
        if event != "call" or not inside or not any(folder in file for folder in folders):
            return
        left -= 1
        if left <= 0:
            sys.setprofile(before)
            fault.happened = True
            raise error("broken off")

    sys.setprofile(entered)
    try:
        yield fault
    finally:
        sys.setprofile(before)
