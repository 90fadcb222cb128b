"""A block in which nothing may be read back from a device, whatever the device: the host would wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_static", "masked_select"),
    *("_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave", "histc"),
}
"""Operators for which the host waits, or whose result has a shape that depends on data."""
BY_MASK = {"index", "index_put", "index_put_"}
PYTHON = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.item}
"""What reads the memory of a CPU's tensor without an operator."""


class HostRead(AssertionError):
    """The host would wait."""


class _Operators(TorchDispatchMode):
    """Refuses operators that read back."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in BY_MASK and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1] if i is not None
        )
        if name in WAITS or masked:
            raise HostRead(str(func))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Refuses methods that do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PYTHON:
            raise HostRead(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def unread() -> Iterator[None]:
    """Within the block, what makes the host wait for a device is refused, whatever the device."""
    with _Methods(), _Operators():
        yield
