"""Which provider computes a call's attention: the fastest that was measured (`table.json`), or a forced one."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from importlib import import_module
from math import log2
from pathlib import Path
from typing import Any

import torch
from kvpass.kernels.choose import force
from kvpass.kernels.prefill_attend.providers.call import Call, Facts, facts_of
from kvpass.kernels.triton_shared.triton_launch import target
from torch import Tensor

NAMES = ("cudnn", "flash", "triton", "cpu_flash")
TABLE = Path(__file__).with_name("table.json")
UNMEASURED = ("flash", "triton")
"""The order on devices whose like is not in the table: what was written for them by their vendor or for it."""

log = logging.getLogger(__name__)
_forced: ContextVar[str | None] = ContextVar("kvpass_provider", default=None)
_refused: set[tuple[str, Facts]] = set()
_decided: dict[tuple[Facts, str], str] = {}


@contextmanager
def use_provider(name: str) -> Iterator[None]:
    """Force a provider for the calls inside the block.

    Raises:
        ValueError: an unknown name. When an op runs: a provider that does not support the call, which is not replaced.
    """
    with force("provider", name, NAMES, _forced):
        yield


def provider_for(facts: Facts) -> str:
    """Name of the provider that computes such a call's attention.

    Raises ValueError if one is forced that does not support it.
    """
    forced = _forced.get()
    if forced is not None:
        if not load(forced).supports(facts):
            raise ValueError(f"prefill_attend: the provider {forced} was asked for, but does not support {facts}")
        return forced
    kind = _kind(facts)
    return next(name for name in fitting(kind) if (name, kind) not in _refused and load(name).enabled())


def decisions() -> dict[str, str]:
    """The providers of the calls so far, by what they were chosen for, in words: for reports."""
    return {text: name for (_, name), text in _decided.items()}


def attend(call: Call) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, S, Dv], log-sum-exp float32 [B, Hq, S], natural) of a call, by its provider.

    If one that was not forced refuses a call that it should support, the next is taken, and the log says so.
    """
    on = target(call.q.device)
    facts = facts_of(call, on.kind, on.arch)
    name = provider_for(facts)
    _note(facts, name)
    out: Tensor
    try:
        out, lse = load(name).attend(call)
    except RuntimeError as error:
        if _forced.get() is not None or name == "triton" or isinstance(error, torch.OutOfMemoryError):
            raise
        log.warning("prefill_attend: %s refuses %s, not asked again: %s", name, described(facts), error)
        _refused.add((name, _kind(facts)))
        return attend(call)
    if name == "triton":
        return out, lse
    if call.softmax.sinks is not None:
        out, lse = _with_sinks(out, lse, call.softmax.sinks)
    if call.shown.tokens is not None:
        ours().mend(call, out, lse)
    return out, lse


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The same with one more logit per head in the denominator. Changes out."""
    column = sinks.unsqueeze(1)  # becomes float32 beside the other
    return out.mul_(torch.sigmoid(lse - column).unsqueeze(-1)), torch.logaddexp(lse, column)


@cache
def load(name: str) -> Any:
    """The module of a provider; triton is imported only when it is asked."""
    return import_module(f"{__package__}.{name}")


def ours() -> Any:
    """Our own kernel's."""
    return load("triton")


@lru_cache(maxsize=1024)
def _kind(facts: Facts) -> Facts:
    """The same for all batches, and for lengths of one order of magnitude."""
    queries, keys = (1 << (n - 1).bit_length() if n > 1 else n for n in (facts.queries, facts.keys))
    return facts._replace(batch=1, queries=queries, keys=keys)


@lru_cache(maxsize=256)
def fitting(facts: Facts) -> tuple[str, ...]:
    """Providers that support such a call, the fastest first; triton is one."""
    found = [name for name in order(facts, table()) if load(name).supports(facts)]
    return tuple(dict.fromkeys([*found, "triton"]))


@cache
def table() -> tuple[dict[str, Any], ...]:
    """The rows of `table.json`: what was measured of which kind of call."""
    return tuple(json.loads(TABLE.read_text(encoding="utf-8"))["rows"])


def order(facts: Facts, rows: tuple[dict[str, Any], ...]) -> tuple[str, ...]:
    """Names by the times of the nearest row of the same kind of device: by dtype, then head dim, then queries."""
    if facts.kind == "interpret":
        return ("triton",)  # whoever interprets a kernel wants to see it
    if facts.kind != "cuda":
        return ("triton",)
    near = [row for row in rows if _alike(row["arch"], facts.arch)]
    if not near:
        return UNMEASURED

    def distance(row: dict[str, Any]) -> tuple[float, ...]:
        dim, queries = abs(log2(row["dim"] / facts.dim)), abs(log2(row["queries"] / facts.queries))
        return row["arch"] != facts.arch, f"torch.{row['dtype']}" != str(facts.dtype), dim, queries

    ms = min(near, key=distance)["ms"]
    return tuple(sorted(ms, key=lambda name: float(ms[name])))


def _alike(measured: int, arch: int) -> bool:
    """Whether what holds on one device is taken to hold on another: data-centre Hopper and Blackwell, or the same."""
    return measured == arch or {measured // 10, arch // 10} <= {9, 10}


def described(facts: Facts) -> str:
    """A call in words."""
    words = facts.sees.encode() or "all keys seen"
    extras = [name for name in ("tokens", "mask", "softcap") if getattr(facts, name)]
    dtype = str(facts.dtype).removeprefix("torch.")
    return (
        f"{facts.kind} {facts.arch or ''} {dtype}, {facts.heads}/{facts.kv_heads} heads of {facts.dim},"
        f" up to {facts.queries} queries and {facts.keys} keys, {', '.join([words, *extras])}"
    )


def _note(facts: Facts, name: str) -> None:
    decision = _kind(facts), name
    if decision not in _decided and len(_decided) < 256:
        _decided[decision] = described(decision[0])
        log.debug("prefill_attend: %s for %s", name, _decided[decision])
