"""Bytes that a call moves, counted in two ways.

`Counting`: what torch's operations inside of it read and write, each of them as if nothing stayed in a cache. It sees
nothing of kernels that are no torch operations.

`Touched`: pages of memory that the processor touched, by the kernel's own marks (Linux: /proc/self/clear_refs). It sees
whatever reads, once, and only tensors that were moved to its memory.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PICKS = ("index_select", "gather", "index.Tensor", "embedding", "take")
"""Operations that read as much of their first input as they give."""
SILENT = ("empty", "new_empty", "_local_scalar_dense", "detach", "alias", "lift_fresh", "size", "stride")


class Counting(TorchDispatchMode):
    """Entered around a call; `bytes` afterwards, `calls` of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.calls = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.is_view or name.startswith(SILENT):
            return result
        self.calls += 1
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        read = made + given[1:] if name.startswith(PICKS) else given
        if name.startswith(("index_copy", "index_fill", "scatter", "index_put")):
            read, made = given[1:], given[1:]  # writes what it was given, and nothing else of the first
        self.bytes += sum(map(_bytes, read)) + sum(map(_bytes, made))
        return result


def _bytes(tensor: Tensor) -> int:
    """Of distinct elements: an expanded dim is read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or size == 0 else 1
    return count * tensor.element_size()


class Touched:
    """Memory whose touched pages are counted.

    Args:
        tensors: those that are to be moved there; `tensors` are the copies.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        page = mmap.PAGESIZE
        room = [-(-max(1, tensor.nbytes) // page) * page for tensor in tensors]
        self.memory = mmap.mmap(-1, sum(room))  # shared: Linux keeps it a mapping of its own
        self.tensors, at = [], 0
        for tensor, size in zip(tensors, room, strict=True):
            flat = torch.frombuffer(self.memory, dtype=torch.uint8, offset=at, count=size)
            held = flat[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            self.tensors.append(held.copy_(tensor))
            at += size
        self.start = torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr()

    def bytes(self, action: Callable[[], Any]) -> int | None:
        """Of the pages that an action touches; None where the kernel does not tell."""
        try:
            Path("/proc/self/clear_refs").write_text("1")
            self._forget_addresses()
            action()
            return self._referenced()
        except OSError:
            return None

    def _forget_addresses(self) -> None:
        """A core marks a page when it looks its address up, not while it remembers it: what is forbidden is forgotten.

        Raises OSError if the kernel will not.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        for allowed in (0, mmap.PROT_READ | mmap.PROT_WRITE):
            if libc.mprotect(ctypes.c_void_p(self.start), ctypes.c_size_t(len(self.memory)), allowed):
                raise OSError(ctypes.get_errno(), "mprotect")

    def _referenced(self) -> int:
        begins, found = f"{self.start:x}-", False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split(" ", 1)[0] and ":" not in line.split(" ", 1)[0]:
                found = line.startswith(begins)
            elif found and line.startswith("Referenced:"):
                return int(line.split()[1]) * 1024
        raise OSError("the mapping is not listed")
