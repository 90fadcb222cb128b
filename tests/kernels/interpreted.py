"""What the kernels' cases share: where Triton's kernels run, a float32 dot for bfloat16, rules, masks.

With TRITON_INTERPRET=1 in Triton's interpreter, on the CPU's tensors: it must be set before the kernels are imported,
so test_triton_interpreter.py runs the cases in processes of their own. Without it on the GPU (tests/gpu). Either way a
call's tensors are carried there and back: a case compares with the references on the CPU.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.compact_slots import triton as compact_slots
from kvpass.kernels.decode_attend import reference
from kvpass.kernels.decode_attend import triton as decode_attend
from kvpass.kernels.decode_attend.call import Call, Token
from kvpass.kernels.prefill_attend import triton as prefill_attend
from kvpass.kernels.rule import Rule
from kvpass.kernels.select_slots import triton as select_slots
from kvpass.kernels.slots.state import State
from kvpass.kernels.testing import causal_mask
from torch import Tensor
from torch.utils._pytree import tree_map_only
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _patch_lang_tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    raise RuntimeError("no GPU: run test_triton_interpreter.py, or set TRITON_INTERPRET=1")


def _dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: object) -> TensorHandle:
    """The interpreter keeps bfloat16 as uint16 and multiplies those integers in a dot (triton 3.6 to 3.9 at least)."""
    x, y = (
        (t.data.astype(np.uint32) << 16).view(np.float32) if t.data.dtype == np.uint16 else t.data.astype(np.float32)
        for t in (a, b)
    )
    return TensorHandle(np.matmul(x, y) + d.data, d.dtype.scalar)


def _patch_once(fn: Callable[..., Any], patch: Callable[..., Any] = interpreter._patch_lang) -> Any:
    """The interpreter patches the language for a kernel, and once more at each call of a function in it: a third of
    its time.
    """
    languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
    if any(tl.core.is_builtin(language.load) for language in languages):
        return patch(fn)
    return SimpleNamespace(restore=lambda: None)


def _patch_tensor(tensor: type, scope: object, patch: Callable[[type, object], None] = _patch_lang_tensor) -> None:
    """The interpreter of triton 3.6 makes ints of arrays of shape (1,), which numpy 2.4 refuses."""
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


if INTERPRETED:
    InterpreterBuilder.create_dot = _dot
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter._patch_lang = _patch_once
    # Sums of integers are made once more in int64 to see whether they overflow: another quarter.
    options = interpreter.interpreter_builder.options
    sanitized = os.environ.get("KVPASS_SANITIZE_OVERFLOW") == "1"
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=sanitized)


class _Carried:
    """Storages of the CPU's tensors, each copied to the device once; strides and aliases stay what they are."""

    def __init__(self) -> None:
        self.copies: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def there(self, x: Tensor) -> Tensor:
        here = x.untyped_storage()
        if here.data_ptr() not in self.copies:
            copy = torch.UntypedStorage(here.nbytes(), device=DEVICE)
            self.copies[here.data_ptr()] = here, copy.copy_(here, False)
        moved = self.copies[here.data_ptr()][1]
        return torch.empty(0, dtype=x.dtype, device=DEVICE).set_(moved, x.storage_offset(), x.shape, x.stride())

    def back(self) -> None:
        """What the kernels wrote, bit for bit."""
        for here, copy in self.copies.values():
            here.copy_(copy, False)


def on_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """A launcher of Triton's kernels, for tensors of the CPU."""

    @wraps(run)
    def carried(*args: Any) -> Any:
        storages = _Carried()
        out = run(*tree_map_only(Tensor, storages.there, args))
        storages.back()
        return tree_map_only(Tensor, Tensor.cpu, out)

    return carried


prefill_attend_triton = on_device(prefill_attend.prefill_attend_triton)


def _decode_attend(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An implementation of a step, with the op's arguments."""

    def given(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: list[Tensor], position: int, scale: float,
        rule: str, sinks: Tensor | None = None, softcap: float = 0.0, arrive: Tensor | None = None, *sight: Any,
    ) -> Tensor:  # fmt: skip
        plan = Rule.parse(rule)
        call = Call.of_step(mask, position, Softmax(scale, sinks, softcap), plan, 0, *sight)
        return run(Token(q, k, v, arrive), State.of(state, plan), call)

    return given


decode_attend_triton = on_device(_decode_attend(decode_attend.decode_attend_triton))
decode_attend_reference = _decode_attend(reference.decode_attend_reference)
select_slots_triton = on_device(select_slots.select_slots_triton)


@on_device
def compact_slots_triton(keys: tuple[Tensor | None, ...], idx: Tensor, cursor: Tensor, state: list[Tensor]) -> None:
    compact_slots.compact_slots_triton(keys, idx, cursor, State(state))


ALL = ("sum", "sumsq", "count")
RULES = {
    "h2o": Rule(stats=("sum",), queries=-1, decode="add", score="sum", recent_num=1, recent_den=2, slots=20),
    "tova": Rule(stats=("sum",), queries=1, carry=False, decode="replace", heads="all", score="sum", slots=20),
    "streaming": Rule(score="position", sinks=4, slots=20),
    "snapkv": Rule(
        stats=("sum", "count"), queries=8, carry=False, decode="add", score="mean", pool="max", pool_size=7, recent=8,
        slots=20,
    ),
    "roco": Rule(
        stats=ALL, queries=-1, decode="add", score="mean", scope_num=3, scope_den=10, sinks=4, recent=5,
        num=1, den=4, floor=16,
    ),
    "max": Rule(stats=ALL, queries=-1, group="max", decode="add", score="sum", slots=20),
    "full": Rule(),
}  # fmt: skip
SCALE = 0.3
SINKS = torch.tensor([0.7, -1.5, 4.0, 9.0])
"""Logits of four query heads."""
SHAPES = {
    "one head": (1, 1, 1, 33, 16, 16),
    "group 3": (2, 6, 2, 70, 24, 20),
    "mha d80": (1, 2, 2, 40, 80, 80),
    "group 16": (1, 16, 1, 35, 32, 48),
    "single": (1, 3, 1, 1, 16, 16),
}
"""B, Hq, Hkv, S, D, Dv: odd lengths, head sizes that are no powers of two, Dv != D."""


def mostly(rule: str, mask: str, *rules: str) -> Any:
    """A case of a rule and a mask, under `make wide` unless the rule is one of `rules`: what a kernel does with masks
    hangs on a rule only where rows are counted (windows) or reduced otherwise (max).
    """
    return pytest.param(rule, mask, marks=[] if rule in rules else pytest.mark.wide)


def masks(name: str, batch: int, heads: int, queries: int, total: int) -> Tensor | None:
    """A mask [.., .., S, T] of a call whose queries are the last of `total` positions."""
    g = torch.Generator().manual_seed(3)
    base = causal_mask(queries, total)
    if name == "none":
        return None
    if name == "left":
        return causal_mask(queries, total, left=[7 * b for b in range(batch)])
    if name == "right":
        return causal_mask(queries, total, right=[3 * b + 2 for b in range(batch)])
    if name == "parted":  # padding between a row's tokens, early ones and, but for two, late ones
        column = torch.arange(total)
        return base & ~(((column >= 5) & (column < 12)) | ((column >= 29) & (column < 32)))
    if name == "heads":  # an additive bias per head, as ALiBi has, with hidden entries at finfo.min
        bias = torch.randn(batch, heads, queries, total, generator=g)
        return bias.masked_fill(~base, torch.finfo(torch.float32).min)
    if name == "holes":  # per head, and some rows see nothing at all
        return base & (torch.rand(batch, heads, queries, total, generator=g) > 0.4)
    assert name == "wide"  # one row for all queries, as some static caches have; wider than the sequence
    return torch.nn.functional.pad(torch.rand(1, 1, 1, total, generator=g) > 0.3, (0, 9))
