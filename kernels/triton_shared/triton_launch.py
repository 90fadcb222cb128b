"""The host side that the Triton launchers share: target, mask arguments, one place where kernels are launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from kvpass.kernels.attention.masks import threshold
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """What a launcher may know of the device when it picks block sizes."""

    kind: str
    """cuda, hip, or interpret (CPU tensors under TRITON_INTERPRET=1)."""
    arch: int
    """Compute capability as in 80, 90; 0 elsewhere."""
    cores: int
    """Streaming multiprocessors or compute units."""

    @property
    def roomy(self) -> bool:
        """Whether a block may have 160 KiB of shared memory (data-centre NVIDIA), not 99 (consumer) or 64 (AMD)."""
        return self.arch in (80, 90, 100, 103)


@dataclass(frozen=True)
class Launch:
    """A launch as it would have been: what ahead-of-time compilation needs."""

    kernel: Any
    arguments: dict[str, Any]


_recording: ContextVar[tuple[Target, list[Launch]] | None] = ContextVar("kvpass_recorded_launches", default=None)


@contextmanager
def record(on: Target) -> Iterator[list[Launch]]:
    """Within the block launchers take the device for `on`, and launches are listed, not run. Outputs are garbage."""
    launches: list[Launch] = []
    token = _recording.set((on, launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


@lru_cache
def _target(device: torch.device) -> Target:
    if device.type == "cpu":
        return Target("interpret", 0, 2)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Target("hip", 0, properties.multi_processor_count)
    return Target("cuda", properties.major * 10 + properties.minor, properties.multi_processor_count)


def target(device: torch.device) -> Target:
    """The target of a device; asked once per device."""
    listed = _recording.get()
    return listed[0] if listed else _target(device)


def recording() -> tuple[Target, list[Launch]] | None:
    """The target and the list of the innermost `record`, if there is one."""
    return _recording.get()


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, **arguments: Any) -> None:
    """Launch a kernel on a device's current stream. An empty grid is no launch."""
    if 0 in grid:
        return
    arguments.setdefault("enable_fp_fusion", True)  # triton's default changes with 3.10
    listed = _recording.get()
    if listed:
        listed[1].append(Launch(kernel, arguments))
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments)


def precision(on: Target) -> str:
    """How float32 dots multiply: three TF32 products on NVIDIA (about float32's error, tensor cores), else plainly."""
    return "tf32x3" if on.kind == "cuda" else "ieee"


def check_head_dims(*dims: int) -> None:
    """Raises ValueError for heads wider than 256, whose tiles no pinned configuration fits."""
    if max(dims) > 256:
        raise ValueError(f'head sizes {dims}: the Triton kernels take up to 256; choose use("reference")')


def power_of_two(n: int, least: int = 1) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def blocks(n: int, size: int) -> int:
    """How many blocks of `size` cover n."""
    return -(-n // size)


def rows_last(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous, as kernels need it, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def mask_arguments(mask: Tensor | None) -> dict[str, Any]:
    """Kernel arguments of a 4-d mask: pointer, strides (0 where it broadcasts), kind, and what counts as hidden."""
    if mask is None:
        return {"p_mask": None, "s_mb": 0, "s_mh": 0, "s_mq": 0, "s_mt": 0, "MASK": 0, "HIDDEN": 0.0}
    if mask.dtype == torch.float64:
        mask = mask.float()
    names = ("s_mb", "s_mh", "s_mq", "s_mt")
    arguments: dict[str, Any] = {
        name: 0 if size == 1 else stride for name, size, stride in zip(names, mask.shape, mask.stride(), strict=True)
    }
    if mask.dtype == torch.bool:
        return {**arguments, "p_mask": mask.view(torch.uint8), "MASK": 1, "HIDDEN": 0.0}
    return {**arguments, "p_mask": mask, "MASK": 2, "HIDDEN": threshold(mask)}
