"""Bytes of live tensors, as the garbage collector and the allocator know them: not what the library says of itself."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


def live() -> dict[int, torch.Tensor]:
    """A tensor for every live storage with memory, by address."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and not isinstance(t, FakeTensor)]
    real = [t for t in tensors if t.layout == torch.strided and t.device.type == "cpu"]
    return {t.untyped_storage().data_ptr(): t for t in real if t.untyped_storage().nbytes() > 0}


def grown(before: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    """Tensors whose storages were not there. `before` keeps its own alive, so no address is used twice."""
    return [t for address, t in live().items() if address not in before]


def kv_bytes(tensors: list[torch.Tensor], head_dim: int) -> int:
    """Storage behind tensors that look like keys and values, dense or compact."""
    return sum(t.untyped_storage().nbytes() for t in tensors if t.ndim == 4 and t.shape[-1] == head_dim)


def all_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def allocations(run: Callable[[], Any]) -> list[int]:
    """Bytes of each allocation, and minus those of each free, in their order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return [event.nbytes() for event in sorted(events, key=lambda one: one.start_ns()) if event.name() == "[memory]"]


def peak(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that a function has allocated at most at one moment, and at its end, above what there was before it."""
    levels = [0, *itertools.accumulate(allocations(run))]
    return max(levels), levels[-1]
