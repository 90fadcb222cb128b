"""Which implementation runs an op: "reference" (pure torch, any device), "native" (CPU) or "triton" (CUDA and ROCm).

Owns the choice and the lazy import; knows no op's arguments. Triton is imported here and only when it is chosen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch

OPS = ("prefill_attend", "decode_attend", "select_slots", "compact_slots")
"""The ops that have both implementations; join_slots and score_slots are pure torch everywhere."""

NATIVE = ("prefill_attend", "decode_attend")
"""Ops that CPUs have in C++ too, for what that knows; what it does not is the reference's, and `kernel` gives that."""

IMPLEMENTATIONS = ("reference", "native", "triton")

_forced: ContextVar[str | None] = ContextVar("kvpass_implementation", default=None)
_loaded: dict[tuple[str, str], tuple[Callable[..., Any], Callable[..., bool]]] = {}


FALLBACK = {"decode_attend": "device"}
"""What runs on a GPU where triton cannot: torch code that reads nothing back, in a file of its own. Else the
reference.
"""

WIDEST = 256
"""Head dimension up to which the triton kernels fit into shared memory."""


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force one implementation of the ops for the calls inside the block.

    Args:
        name: `reference` (plain torch, any device), `native` (C++, on CPUs) or `triton` (CUDA and ROCm).

    Raises:
        ValueError: an unknown name. When an op runs: `triton` on CPU tensors, which is never replaced.
    """
    with force("implementation", name, IMPLEMENTATIONS, _forced):
        yield


@contextmanager
def force(what: str, name: str, known: Sequence[str], choice: ContextVar[str | None]) -> Iterator[None]:
    """A choice that is made by name for the calls inside the block. Raises ValueError for an unknown name."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(known)}")
    token = choice.set(name)
    try:
        yield
    finally:
        choice.reset(token)


def implementation(op: str, device: torch.device) -> str:
    """Name of the implementation that runs `op` on `device`: the forced one, else triton on CUDA, else native where
    the op has it, else reference.

    Raises ValueError if triton is forced for tensors it cannot read.
    """
    forced = _forced.get()
    if forced is None or forced == "native":
        if device.type == "cuda":
            return "triton"
        return "native" if op in NATIVE and device.type == "cpu" else "reference"
    if forced == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"kvpass::{op}: the triton kernel was asked for explicitly, but the tensors are on {device.type}; "
            'move them to a GPU, set TRITON_INTERPRET=1 before importing triton, or use("reference")'
        )
    return forced


def kernel(op: str, device: torch.device, *facts: Any) -> Callable[..., Any]:
    """The function that runs `op` on `device`; imported on first use, then cached. facts: what the op is given;
    triton's implementation says by its `supports(*facts)` whether it can run that. If it cannot, `FALLBACK` runs,
    unless triton is forced.
    """
    chosen = implementation(op, device)
    chosen = "reference" if chosen == "native" else chosen
    found, supports = _loaded.get((op, chosen)) or _load(op, chosen)
    if _forced.get() is None and not supports(*facts):
        other = FALLBACK.get(op, "reference")
        found, _ = _loaded.get((op, other)) or _load(op, other)
    return found


def _load(op: str, name: str) -> tuple[Callable[..., Any], Callable[..., bool]]:
    module = import_module(f"kvpass.kernels.{op}.{name}")
    _loaded[op, name] = getattr(module, f"{op}_{name}"), getattr(module, "supports", _anything)
    return _loaded[op, name]


def _anything(*facts: Any) -> bool:
    """A reference runs everything."""
    return True
