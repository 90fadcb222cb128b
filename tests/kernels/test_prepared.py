"""Prepared launches, with stand-ins for Triton's kernels: which is launched, with what, when one is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from kvpass.kernels.triton_shared.triton_launch import Target, record
from kvpass.kernels.triton_shared.triton_prepared import Prepared
from triton.compiler import CompiledKernel

CPU = torch.device("cpu")


class Compiled(CompiledKernel):  # type: ignore[misc]  # no types in it
    def __init__(self, launched: list[Any]) -> None:
        self.launched = launched

    def __del__(self) -> None:
        """Nothing was loaded."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *values: self.launched.append(("direct", grid, values))


class Kernel:
    """What `triton.jit` gives, as far as a launch needs it."""

    arg_names = ("p_x", "p_none", "n", "SIZE")
    __name__ = "kernel"

    def __init__(self, result: bool = True) -> None:
        self.launched: list[Any] = []
        self.result = result

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*values: Any, **options: Any) -> Any:
            self.launched.append(("looked up", grid, values, options))
            return Compiled(self.launched) if self.result else None

        return run


def prepared(kernel: Any) -> Prepared:
    return Prepared(kernel, (2, 3), CPU, ("p_x", "p_none"), ("n",), SIZE=16, num_warps=4)


def test_a_kernel_is_looked_up_once() -> None:
    kernel, x, y = Kernel(), torch.zeros(4), torch.ones(4)
    step = prepared(kernel)
    step.launch((x, None), (5,))
    step.launch((y, None), (7,))
    options = {"num_warps": 4, "enable_fp_fusion": True}
    first, second = kernel.launched
    assert first == ("looked up", (2, 3), (x, None, 5, 16), options)
    assert second == ("direct", (2, 3, 1), (y, None, 7, 16))


def test_what_is_compiled_anew() -> None:
    kernel, x = Kernel(), torch.zeros(8)
    step = prepared(kernel)
    for given, n in [(x, 1), (x[1:], 1), (x, 2**31), (x[4:], 9), (x[2:], 3), (x, 2**40)]:
        step.launch((given, None), (n,))
    assert [how for how, *_ in kernel.launched] == ["looked up", "looked up", "looked up", "direct", "direct", "direct"]


def test_an_interpreter_has_nothing_compiled() -> None:
    kernel = Kernel(result=False)
    step = prepared(kernel)
    for _ in range(2):
        step.launch((torch.zeros(4), None), (5,))
    assert [how for how, *_ in kernel.launched] == ["looked up", "looked up"]


def test_an_argument_that_nobody_gives() -> None:
    with pytest.raises(TypeError, match="no argument for SIZE"):
        Prepared(Kernel(), (1,), CPU, ("p_x", "p_none"), ("n",), num_warps=4)


def test_recorded_and_not_run() -> None:
    kernel = Kernel()
    with record(Target("cuda", 90, 132)) as listed:
        prepared(kernel).launch((None, None), (5,))
    assert kernel.launched == []
    assert listed[0].arguments == {
        "p_x": None, "p_none": None, "n": 5, "SIZE": 16, "num_warps": 4, "enable_fp_fusion": True
    }  # fmt: skip
