"""The device that the stages run on, and how a call is timed there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from kvpass.kernels.choose import use

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


@contextmanager
def triton() -> Iterator[None]:
    """Triton's kernels: what runs on a GPU anyway; on a CPU (interpreted) they must be asked for."""
    if GPU:
        yield
        return
    with use("triton"):
        yield


@contextmanager
def unsynced() -> Iterator[None]:
    """Within the block, whatever waits for the device fails."""
    if not GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call, until the device is done."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def median_ms(call: Callable[[], Any]) -> float:
    """Milliseconds: on a GPU by events, the L2 cache flushed before each call."""
    if not GPU:
        return 1e3 * timed(call)
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))


def replayed_ms(call: Callable[[], Any]) -> float | None:
    """Milliseconds of the call as a CUDA graph, so without its host's work; None on a CPU."""
    if not GPU:
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch.cuda.graph asks: compiled and warm before the capture
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return median_ms(graph.replay)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm; NaN if either has one."""
    x, y = ours.float(), theirs.float()
    return float((x - y).norm() / y.norm())
