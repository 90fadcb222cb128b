"""A device that records on a CPU, for tests of what CUDA graphs do: it knows addresses and nothing else.

Like a CUDA graph, a recording reads and writes the memory that its inputs lay in, whoever has it now; recording runs
nothing; outputs are the same tensors after every replay; and whoever waits for the device cannot be recorded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvpass.runtime import graph_device
from kvpass.runtime.graph_device import GraphDevice, Pool, Recording, Run

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2", "item")


class NoReads(TorchDispatchMode):
    """Refuses what a device would be waited for; ops of kvpass are looked at from outside only."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "overloadpacket", func).__name__
        if name in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        return func(*args, **(kwargs or {}))


def at_address(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same memory that does not keep it alive."""
    size = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    count = size * tensor.element_size() if tensor.numel() else 0
    if not count:
        return torch.empty_like(tensor)
    memory = (ctypes.c_uint8 * count).from_address(tensor.data_ptr())
    flat = torch.from_numpy(np.ctypeslib.as_array(memory)).view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride())


class StandIn(GraphDevice):
    """Counts what it was asked.

    Attributes:
        fails: raised by the next recordings.
    """

    def __init__(self) -> None:
        self.recorded, self.replayed, self.pools = 0, 0, 0
        self.fails: list[Exception] = []

    def pool(self, device: torch.device) -> Pool:
        self.pools += 1
        return StandInPool(self)


class StandInPool(Pool):
    def __init__(self, device: StandIn) -> None:
        self.device = device

    def record(self, run: Run, inputs: Sequence[Any]) -> Recording:
        if self.device.fails:
            raise self.device.fails.pop()
        with torch.inference_mode(False), torch.no_grad():
            given = [at_address(x) if isinstance(x, torch.Tensor) else x for x in inputs]
            before = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
            try:
                with NoReads():
                    outputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in run(*given)]
            finally:
                for now, was in zip(given, before, strict=True):
                    if isinstance(now, torch.Tensor):
                        now.copy_(was)
            for value in outputs:
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    value.fill_(float("nan"))
        self.device.recorded += 1
        return StandInRecording(self.device, run, given, outputs)


class StandInRecording(Recording):
    def __init__(self, device: StandIn, run: Run, given: Sequence[Any], outputs: Sequence[Any]) -> None:
        self.device, self.run, self.given, self.outputs = device, run, given, outputs

    def replay(self) -> None:
        with torch.inference_mode(False), torch.no_grad(), NoReads():
            results = self.run(*self.given)
            for memory, value in zip(self.outputs, results, strict=True):
                if isinstance(memory, torch.Tensor):
                    memory.copy_(value)
        self.device.replayed += 1


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Let the CPU record."""
    device = StandIn()
    monkeypatch.setitem(graph_device.DEVICES, "cpu", device)
    return device
