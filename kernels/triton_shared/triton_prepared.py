"""Launches that are made again and again with other tensors: what does not change is in place already."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from kvpass.kernels.triton_shared.triton_launch import Launch, recording
from torch import Tensor
from triton.compiler import CompiledKernel  # type: ignore[import-untyped]  # no types in it


class Prepared:
    """A kernel with its grid and the arguments that stay.

    Triton's own launch looks at all arguments to find the compiled kernel, which costs more than some kernels take.
    What it looks at in those that change is whether pointers are aligned and integers need 64 bits: kernels are kept by
    that and launched directly, as Triton's tutorials do.

    Args:
        kernel: its numbers that change are among `do_not_specialize`.
        grid: not empty.
        device: of the tensors.
        tensors, numbers: names of the arguments that a launch gives, in that order. A tensor keeps its dtype, and that
            it is None; numbers are not negative.
        staying: all others, and options of the launch.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        device: torch.device,
        tensors: tuple[str, ...],
        numbers: tuple[str, ...],
        **staying: Any,
    ) -> None:
        names: list[str] = kernel.arg_names
        staying.setdefault("enable_fp_fusion", True)  # triton's default changes with 3.10
        missing = set(names) - {*tensors, *numbers} - set(staying)
        if missing:
            raise TypeError(f"{kernel.__name__}: no argument for {', '.join(sorted(missing))}")
        self._kernel, self._grid, self._device, self._names = kernel, grid, device, names
        self._whole_grid = (*grid, 1, 1)[:3]
        self._options = {name: value for name, value in staying.items() if name not in names}
        self._values = [staying.get(name) for name in names]
        self._places = [names.index(name) for name in (*tensors, *numbers)]
        self._compiled: dict[Any, Any] = {}

    def launch(self, tensors: tuple[Tensor | None, ...], numbers: tuple[int, ...]) -> None:
        """On the current stream of the device."""
        values = self._values.copy()
        for place, value in zip(self._places, (*tensors, *numbers), strict=True):
            values[place] = value
        listed = recording()
        if listed:
            listed[1].append(Launch(self._kernel, {**dict(zip(self._names, values, strict=True)), **self._options}))
            return
        device = self._device
        other = device.type == "cuda" and torch.cuda.current_device() != device.index
        with torch.cuda.device(device) if other else _HERE:
            kind = _kind(tensors, numbers)
            found = self._compiled.get(kind)
            if found is not None:
                found[self._whole_grid](*values)
                return
            found = self._kernel[self._grid](*values, **self._options)
            if isinstance(found, CompiledKernel):
                self._compiled[kind] = found


_HERE = nullcontext()


def _kind(tensors: tuple[Tensor | None, ...], numbers: tuple[int, ...]) -> Any:
    """What Triton compiles anew for; True if all pointers are aligned and no number is large."""
    bits = large = 0
    for x in tensors:
        if x is not None:
            bits |= x.data_ptr()
    for n in numbers:
        large |= n
    if bits % 16 == 0 and large < 2**31:
        return True
    aligned = tuple([x is not None and x.data_ptr() % 16 == 0 for x in tensors])
    return aligned, tuple([n < 2**31 for n in numbers])
