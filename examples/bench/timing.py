"""How a call is timed, and how contenders take turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def timed(action: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call, until the device is done."""
    _wait(device)
    start = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def turned(items: Sequence[T], by: int) -> list[T]:
    """Contenders in the order of round `by`: whoever comes first comes last in the next one."""
    by %= len(items)
    return [*items[by:], *items[:by]]


@contextmanager
def without_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The quartiles; of one value, itself."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median of the ratios of rounds: what disturbs a round disturbs both of its times."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
