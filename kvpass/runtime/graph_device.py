"""A device that records what a call launches and runs it again: all that kvpass asks of CUDA graphs.

What is recorded reads and writes the memory that it was given, and returns tensors in memory of its own, which later
recordings and replays of the same pool may use again.
"""

from __future__ import annotations

import gc
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

Run = Callable[..., Sequence[Any]]


class Recording(ABC):
    """What one call launched.

    Attributes:
        outputs: what the call returned; tensors among them hold what the last replay wrote.
    """

    outputs: Sequence[Any]

    @abstractmethod
    def replay(self) -> None:
        """Launch all of it again."""


class Pool(ABC):
    """Memory that recordings share: none of them runs at the same time as another."""

    @abstractmethod
    def record(self, run: Run, inputs: Sequence[Any]) -> Recording:
        """Record `run(*inputs)` without running it.

        Raises:
            RuntimeError: it does what cannot be recorded (it waits for the device, or memory is exhausted); nothing has
                run.
        """


class GraphDevice(ABC):
    """A kind of device that can record."""

    @abstractmethod
    def pool(self, device: torch.device) -> Pool:
        """New memory for recordings."""


class CudaGraphs(GraphDevice):
    def pool(self, device: torch.device) -> Pool:
        return _CudaPool(device)


class _CudaPool(Pool):
    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.handle = torch.cuda.graph_pool_handle()
            self.side = torch.cuda.Stream()
        self.last: torch.cuda.Stream | None = None

    def record(self, run: Run, inputs: Sequence[Any]) -> Recording:
        with torch.cuda.device(self.device), _NO_OTHER:
            graph, current = torch.cuda.CUDAGraph(), self.ordered()
            self.side.wait_stream(current)
            collecting = gc.isenabled()
            gc.disable()  # what dies while a stream is recorded may launch something
            try:
                with torch.cuda.stream(self.side):
                    outputs = self._recorded(graph, run, inputs)
            finally:
                if collecting:
                    gc.enable()
            current.wait_stream(self.side)
        return _CudaRecording(self, graph, outputs)

    def _recorded(self, graph: torch.cuda.CUDAGraph, run: Run, inputs: Sequence[Any]) -> Sequence[Any]:
        graph.capture_begin(pool=self.handle, capture_error_mode="thread_local")
        try:
            outputs = run(*inputs)
        except BaseException:
            with suppress(RuntimeError):  # the recording is no good, which is known
                graph.capture_end()
            raise
        graph.capture_end()
        return outputs

    def ordered(self) -> torch.cuda.Stream:
        """The stream to go on in, behind what this pool has launched in others."""
        stream = torch.cuda.current_stream(self.device)
        if self.last is not None and self.last != stream:
            stream.wait_stream(self.last)
        self.last = stream
        return stream


class _CudaRecording(Recording):
    def __init__(self, pool: _CudaPool, graph: torch.cuda.CUDAGraph, outputs: Sequence[Any]) -> None:
        self.pool, self.graph, self.outputs = pool, graph, outputs

    def replay(self) -> None:
        self.pool.ordered()
        self.graph.replay()


_NO_OTHER = threading.Lock()
"""One recording at a time in the process."""

DEVICES: dict[str, GraphDevice] = {"cuda": CudaGraphs()}
"""By `torch.device.type`."""
