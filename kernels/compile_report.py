"""Ahead-of-time compilation of every Triton kernel as its launcher launches it, without a GPU.

`python -m kvpass.kernels.compile_report` writes docs/kernels_compiled.md: registers, shared memory and spills per
kernel and target. A kernel that compiles without spills can still be wrong or slow on hardware; tests/kernels and
tests/gpu check the values.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton  # type: ignore[import-untyped]  # no types in it
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.attention.visibility import Sees, Shown, token_bounds
from kvpass.kernels.codecs.storage import coded
from kvpass.kernels.decode_attend.call import Call, Token
from kvpass.kernels.slots.state import State
from kvpass.kernels.slots.statistics import Statistics
from torch import Tensor
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]  # no types in it
from triton.compiler import ASTSource  # type: ignore[import-untyped]  # no types in it

from .compact_slots.triton import compact_slots_triton
from .decode_attend.triton import decode_attend_triton
from .prefill_attend.providers.choose import use_provider
from .prefill_attend.triton import prefill_attend_triton
from .rule import Rule
from .select_slots.triton import select_slots_triton
from .triton_shared.triton_launch import Launch, Target, record

TARGETS = {
    "sm_80": (Target("cuda", 80, 108), GPUTarget("cuda", 80, 32)),
    "sm_90": (Target("cuda", 90, 132), GPUTarget("cuda", 90, 32)),
    "sm_100": (Target("cuda", 100, 148), GPUTarget("cuda", 100, 32)),
    "gfx942": (Target("hip", 0, 304), GPUTarget("hip", "gfx942", 64)),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Shared memory that one block may have, in bytes."""

_H2O = Rule(stats=("sum",), queries=-1, decode="add", score="sum", recent_num=1, recent_den=2, num=1, den=5)
_ROCO = Rule(
    stats=("sum", "sumsq", "count"), queries=-1, decode="add", score="mean", scope_num=3, scope_den=10,
    sinks=4, recent=10, num=1, den=5,
)  # fmt: skip
_SNAPKV = Rule(stats=("sum", "count"), queries=32, carry=False, decode="add", score="mean", recent=32, num=1, den=5)
_TOVA = Rule(stats=("sum",), queries=1, carry=False, decode="replace", score="sum", heads="all", num=1, den=5)
_INT4 = _H2O.replace(k_as="int4", v_as="int4", rotated=True, residual=128, whole_sinks=4)
_INT8 = _ROCO.replace(k_as="int8", v_as="int8", residual=32)
_FP8 = _SNAPKV.replace(k_as="fp8_e4m3", v_as="fp8_e5m2", rotated=True)
_INT2 = _H2O.replace(k_as="int2", v_as="int2", rotated=True, scale_group=32, residual=128, whole_sinks=4)
_TURBO = _H2O.replace(k_as="turbo4", v_as="turbo3", rotated=True, residual=128, whole_sinks=4)
_TWO = _H2O.replace(k_as="int3", v_as="int8_symmetric", scale_group=24)


@dataclass(frozen=True)
class Case:
    """One way a model may call the ops."""

    name: str
    dtype: torch.dtype
    dim: int
    group: int
    mask: str
    """Words, or `bool` or `float`: a mask instead."""
    extends: bool
    rule: Rule
    tokens: bool = False
    sinks: bool = False
    softcap: float = 0.0


CASES = (
    Case("bf16 d64 causal h2o", torch.bfloat16, 64, 3, "causal", False, _H2O),
    Case("bf16 d128 causal roco", torch.bfloat16, 128, 4, "causal", False, _ROCO),
    Case("bf16 d128 causal tokens h2o", torch.bfloat16, 128, 4, "causal", False, _H2O, tokens=True),
    Case("fp16 d128 window tokens snapkv", torch.float16, 128, 4, "causal window=512", False, _SNAPKV, tokens=True),
    Case("bf16 d128 extend chunk roco", torch.bfloat16, 128, 4, "causal chunk=256", True, _ROCO, tokens=True),
    Case("bf16 d64 mha float tova", torch.bfloat16, 64, 1, "float", False, _TOVA),
    Case("bf16 d128 bool roco", torch.bfloat16, 128, 4, "bool", False, _ROCO),
    Case("bf16 d80 extend bool h2o", torch.bfloat16, 80, 8, "bool", True, _H2O),
    Case("fp16 d256 extend float snapkv", torch.float16, 256, 8, "float", True, _SNAPKV),
    Case("fp32 d64 bool roco", torch.float32, 64, 3, "bool", False, _ROCO),
    Case("fp32 d128 causal h2o", torch.float32, 128, 4, "causal", False, _H2O),
    Case("fp32 d256 bool h2o", torch.float32, 256, 4, "bool", False, _H2O),
    Case("bf16 d64 bool sinks h2o", torch.bfloat16, 64, 8, "bool", False, _H2O, sinks=True),
    Case("bf16 d256 bool softcap snapkv", torch.bfloat16, 256, 2, "bool", False, _SNAPKV, softcap=50.0),
    Case("bf16 d128 int4 turned copies h2o", torch.bfloat16, 128, 4, "causal", False, _INT4),
    Case("fp16 d128 int8 copies roco", torch.float16, 128, 8, "causal", False, _INT8),
    Case("bf16 d128 fp8 turned bool snapkv", torch.bfloat16, 128, 4, "bool", False, _FP8),
    Case("bf16 d64 mha int2 turned copies h2o", torch.bfloat16, 64, 1, "causal", False, _INT2),
    Case("fp32 d128 int4 turned copies h2o", torch.float32, 128, 4, "causal", False, _INT4),
    Case("bf16 d128 turbo4 and turbo3 turned copies h2o", torch.bfloat16, 128, 4, "causal", False, _TURBO),
    Case("bf16 d80 int3 and int8 in groups of 24 h2o", torch.bfloat16, 80, 4, "causal", False, _TWO),
)
"""Of rules whose slots hold codes the step alone: the other kernels meet numbers."""


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs on a target."""

    case: str
    kernel: str
    target: str
    registers: int
    shared: int
    """Bytes of shared memory."""
    spills: int
    """Bytes of stack a thread (NVIDIA), or spilled vector registers plus bytes of scratch (AMD)."""
    warps: int


def launches(case: Case, on: Target) -> list[Launch]:
    """Every launch of a multi-token call and of a decode step, recorded and not run. Lengths are odd on purpose."""
    heads, length, slots = 2, 1001, 331
    queries = 77 if case.extends else length
    q, k, v = (torch.zeros(1, h, n, case.dim, dtype=case.dtype) for h, n in _sizes(heads, case.group, queries, length))
    pos = torch.zeros(1, heads, length, dtype=torch.int32) if case.extends else None
    stats = torch.zeros(len(case.rule[Statistics].stats), 1, heads, length)
    state = State.empty(case.rule, k, B=1, H=heads, C=slots, D=case.dim, V=case.dim)
    one = slice(0, 1)
    softmax = Softmax(0.125, torch.zeros(heads * case.group, dtype=case.dtype) if case.sinks else None, case.softcap)
    with record(on) as listed, use_provider("triton"):
        if not coded(case.rule):
            prefill_attend_triton(q, k, v, pos, _shown(case, queries, length), softmax, case.rule)
            idx = select_slots_triton(torch.zeros(1, heads, length), state.cursor, slots)
            compact_slots_triton((k, v, pos, stats), idx, state.cursor.clone(), state)
        token = Token(q[:, :, one], k[:, :, one], v[:, :, one])
        call = Call(_mask(case, 1, length + 1), length, softmax, case.rule)
        decode_attend_triton(token, state, call)
    return listed


def _sizes(heads: int, group: int, queries: int, length: int) -> list[tuple[int, int]]:
    return [(heads * group, queries), (heads, length), (heads, length)]


def _shown(case: Case, queries: int, length: int) -> Shown:
    mask = _mask(case, queries, length)
    position = length - queries
    tokens = torch.ones(1, length, dtype=torch.bool) if case.tokens else None
    bounds = None if tokens is None else token_bounds(tokens, position, queries)
    sees = Sees() if mask is not None else Sees.parse(case.mask)
    return Shown(sees.within(queries, position), queries, position, tokens, bounds, mask)


def _mask(case: Case, queries: int, length: int) -> Tensor | None:
    dtype = {"bool": torch.bool, "float": case.dtype}.get(case.mask)
    return None if dtype is None else torch.zeros(1, 1, queries, length, dtype=dtype)


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Compile a recorded launch for a target, specialised as Triton's own launcher would."""
    names: dict[torch.dtype, str] = {
        torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
        torch.int32: "i32", torch.uint8: "u8",
    }  # fmt: skip
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    options = dict(launch.arguments)
    for index, parameter in enumerate(launch.kernel.params):
        value = options.pop(parameter.name)
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and free):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{names[value.dtype]}"
            aligned = value.data_ptr() % 16 == 0
            attributes |= {(index,): [["tt.divisibility", 16]]} if aligned else {}
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            divisible = isinstance(value, int) and value % 16 == 0 and free
            attributes |= {(index,): [["tt.divisibility", 16]]} if divisible else {}
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def measure(case: Case, target: str) -> list[Compiled]:
    """Compile every kernel of a case for a target."""
    on, gpu = TARGETS[target]
    rows = []
    for launch in launches(case, on):
        binary = compile_launch(launch, gpu)
        read: Callable[[Any], tuple[int, int]] = _amd_usage if gpu.backend == "hip" else _nvidia_usage
        registers, spills = read(binary)
        meta = binary.metadata
        rows.append(Compiled(case.name, meta.name, target, registers, meta.shared, spills, meta.num_warps))
    return rows


def _nvidia_usage(binary: Any) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) a thread: kernels have no arrays, so stack means spills."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd_usage(binary: Any) -> tuple[int, int]:
    """(vector registers, spilled ones plus bytes of scratch). Scalar registers spill into vector lanes: not counted."""
    text = binary.asm["amdgcn"]
    names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    count, spilled, scratch = (int(re.findall(rf"\.{name}:\s+(\d+)", text)[0]) for name in names)
    return count, spilled + scratch


def table(rows: list[Compiled]) -> str:
    """The rows as a markdown table."""
    lines = ["| kernel | case | target | warps | registers | shared bytes | spills |", "| --- " * 7 + "|"]
    lines += [
        f"| {r.kernel} | {r.case} | {r.target} | {r.warps} | {r.registers} | {r.shared} | {r.spills} |"
        for r in sorted(rows, key=lambda r: (r.kernel, r.case, r.target))
    ]
    return "\n".join(lines)


def main() -> None:
    """Write docs/kernels_compiled.md."""
    rows = [row for case in CASES for target in TARGETS for row in measure(case, target)]
    head = (
        "# Triton kernels, compiled ahead of time\n\n"
        "Generated by `python -m kvpass.kernels.compile_report` with "
        f"triton {triton.__version__}, torch {torch.__version__}. No GPU takes part: what they give and how fast is in "
        "[gpu.md](gpu.md). Block sizes are pinned, not tuned.\n\n"
    )
    path = Path(__file__).resolve().parent.parent / "docs" / "kernels_compiled.md"
    path.write_text(head + table(rows) + "\n", encoding="utf-8")
    print(table(rows), f"\nwritten to {path}")


if __name__ == "__main__":
    main()
