"""The providers of attention alone: each against the reference, and its time; and which of them the table chooses."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from gpu.device import DEVICE, GPU, difference, median_ms
from gpu.record import Record
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.attention.visibility import Sees, Shown, token_bounds
from kvpass.kernels.prefill_attend.providers import choose
from kvpass.kernels.prefill_attend.providers.call import Call, facts_of
from kvpass.kernels.prefill_attend.triton_call import call_of
from kvpass.kernels.triton_shared.triton_launch import target
from torch import Tensor

HEADS, KV_HEADS = (32, 8) if GPU else (2, 1)
DTYPE = torch.bfloat16 if GPU else torch.float32
PROVIDED = ((1, 2048, 128), (1, 8192, 128), (8, 4096, 128), (1, 8192, 64), (1, 8192, 256)) if GPU else ((1, 32, 16),)
"""Batch, tokens, head dim."""
ALLOWED = 2e-2 if GPU else 1e-5
"""Relative difference from attention in float32: two roundings of bfloat16 are 4e-3."""


def call(batch: int, length: int, dim: int, said: str) -> Call:
    """A causal call; `padded`: on the left, each sequence by another length."""
    q, k, v = (
        torch.randn(batch, length, heads, dim, device=DEVICE, dtype=DTYPE).transpose(1, 2)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    tokens = None
    if said == "padded":
        tokens = torch.arange(length, device=DEVICE) >= 3 * torch.arange(batch, device=DEVICE)[:, None] + 3
    bounds = None if tokens is None else token_bounds(tokens, 0, length)
    return call_of(q, k, v, None, Shown(Sees(causal=True), length, 0, tokens, bounds), Softmax(dim**-0.5))


def provided(name: str, given: Call) -> dict[str, Any]:
    """One provider's attention and log-sum-exp against both in float32, and its time."""
    batch, heads, length, dim = given.q.shape
    with choose.use_provider(name):
        out, lse = choose.attend(given)
        rows = slice(0, min(512, length))
        want, sums = expected(given, rows)
        gap = difference(out[:, :, rows], want)
        assert gap <= ALLOWED, f"differs from attention in float32 by {gap:.2g}"  # NaN is not <=
        found = {"difference": gap} | checked_lse(lse[:, :, rows], sums)
        ms = median_ms(partial(choose.attend, given))
    return found | {"ms": ms, "tflop_per_s": 2 * batch * heads * dim * length**2 / ms / 1e9}


def expected(call: Call, rows: slice) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp of some queries in float32, blind ones zero and +inf."""
    shown, length = call.shown, call.k.shape[2]
    k, v = (x.float().repeat_interleave(HEADS // KV_HEADS, 1) for x in (call.k, call.v))
    seen = shown.keys(torch.arange(length, device=DEVICE)[None, None], rows.start, rows.stop)
    logits = (call.q[:, :, rows].float() @ k.mT * call.softmax.scale).masked_fill(~seen, float("-inf"))
    lse = logits.logsumexp(-1)
    return (logits.softmax(-1).nan_to_num() @ v), lse.masked_fill(lse == float("-inf"), float("inf"))


def checked_lse(lse: Tensor, want: Tensor) -> dict[str, float]:
    """A log-sum-exp of another base or scale would be far off; blind queries are +inf in both."""
    sure = want.isfinite()
    assert torch.equal(sure, lse.isfinite()), "other queries see nothing"
    gap = float((lse - want)[sure].abs().amax())
    assert gap <= 5e-2, f"log-sum-exp differs by {gap:.2g}"
    return {"lse_difference": gap}


def providers(record: Record) -> None:
    """Each provider that supports a shape, forced by name; `chosen`: whom the table chooses."""
    for batch, length, dim in PROVIDED:
        for said in ("words", "padded"):
            given = call(batch, length, dim, said)
            on = target(given.q.device)
            facts = facts_of(given, on.kind, on.arch)
            row = {"kernel": "provider", "batch": batch, "tokens": length, "dim": dim, "said": said}
            row["chosen"] = choose.provider_for(facts)
            for name in choose.NAMES:
                if choose.load(name).supports(facts):
                    record.attempt(row | {"what": name}, partial(provided, name, given))
