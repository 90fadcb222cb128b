"""Calls that are broken off: an error from inside kvpass' kernels, at the n-th function that is entered there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

ERRORS: dict[str, tuple[type[BaseException], tuple[str, ...]]] = {
    "an interrupt": (KeyboardInterrupt, ("/kernels/",)),
    "no memory": (torch.OutOfMemoryError, ("/kernels/",)),
    "a scorer": (ZeroDivisionError, ("/kernels/rank/",)),
}
"""What is raised, and in which folders."""


class Fault:
    """Whether it happened."""

    happened = False


@contextmanager
def broken_off(kind: str, after: int) -> Iterator[Fault]:
    """Raise in the body of the `with`, when so many functions have been entered; not at all if there are fewer."""
    error, folders = ERRORS[kind]
    fault, left, before = Fault(), after, sys.getprofile()

    def entered(frame: Any, event: str, _: Any) -> None:
        nonlocal left
        if event != "call" or not any(folder in frame.f_code.co_filename for folder in folders):
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
