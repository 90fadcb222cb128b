"""prefill_attend in Triton. Tested in the interpreter and compiled ahead of time; earlier forms of it ran on an H200
(docs/gpu.md).
"""

from __future__ import annotations

import torch
from kvpass.kernels.attention.memory import joined
from kvpass.kernels.attention.observation import Observation, emission, emitted
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.attention.visibility import Shown
from kvpass.kernels.choose import WIDEST
from kvpass.kernels.prefill_attend.providers import choose
from kvpass.kernels.prefill_attend.providers.call import Call
from kvpass.kernels.rule import Rule
from kvpass.kernels.triton_shared.triton_launch import Target, block_sizes, blocks, check_head_dims, launch, target
from torch import Tensor

from .triton_call import call_of, shared
from .triton_statistics import statistics_kernel


def supports(q: Tensor, rule: str, bias: Tensor | None = None) -> bool:
    """Attention's sums, squares and counts, of heads that fit into shared memory, without biases of slots."""
    return bias is None and q.shape[3] <= WIDEST and set(emitted(Rule.parse(rule))) <= {"sum", "sumsq", "count"}


def prefill_attend_triton(
    q: Tensor, k: Tensor, v: Tensor, pos: Tensor | None, shown: Shown, softmax: Softmax, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kvpass.kernels.prefill_attend.prefill_attend`. Saves a log-sum-exp [B, Hq, S]; no S x L matrix exists, and
    nothing is read by the host.
    """
    check_head_dims(q.shape[3], v.shape[3])
    call = call_of(q, k, v, pos, shown, softmax)
    out, lse = choose.attend(call)
    if softmax.beside is not None:
        out, lse = joined(out, lse, softmax.beside)
    valid = _valid(call)
    watched = rule[Observation].queries != 0 and bool(emitted(rule))
    make = q.new_empty if watched else q.new_zeros
    stats = make(len(emitted(rule)), len(q), k.shape[1], k.shape[2], dtype=torch.float32)
    if watched:
        _observe(call, lse, valid, stats, rule)
    return out, stats, valid


def _valid(call: Call) -> Tensor:
    """See `Shown.arrived`, of which the survey of a mask knows the mask's part."""
    shown, sizes = call.shown, (len(call.q), call.q.shape[2])
    if call.survey is not None:
        valid = call.survey.valid.view(torch.bool)
        return valid if shown.tokens is None else valid & _own(shown.tokens, shown)
    if shown.tokens is None:
        return call.q.new_ones(sizes, dtype=torch.bool)
    return _own(shown.tokens, shown).expand(sizes).clone(memory_format=torch.contiguous_format)


def _own(tokens: Tensor, shown: Shown) -> Tensor:
    """Columns of the call's own tokens."""
    return tokens.narrow(1, shown.position, shown.queries)


def _observe(call: Call, lse: Tensor, valid: Tensor, stats: Tensor, rule: Rule) -> None:
    """The second pass: fills the statistics [N, B, Hkv, L]."""
    _, batch, heads, length = stats.shape
    survey, q = call.survey, call.q
    size = config(call, rule, target(q.device))
    parted = survey is not None or call.shown.tokens is not None
    window = rule[Observation].queries > 0
    launch(
        statistics_kernel,
        (batch * heads, blocks(length, size["BN"])),
        q.device,
        **shared(call, lse),
        **size,
        p_span=None if survey is None else survey.keys,
        p_valid=valid.view(torch.uint8) if parted else None,
        p_start=_start(valid, rule) if parted and window else None,
        p_end=None if survey is None else survey.end,
        p_stats=stats,
        HKV=heads,
        spanning=1 if survey is None else survey.keys.shape[1],
        sharing=1 if survey is None else q.shape[1] // survey.whole.shape[1],
        G=q.shape[1] // heads,
        OBSERVED=rule[Observation].queries,
        MEAN=rule[Observation].group == "mean",
        SUM=emission(rule, "sum"),
        SUMSQ=emission(rule, "sumsq"),
        COUNT=emission(rule, "count"),
    )


def _start(valid: Tensor, rule: Rule) -> Tensor:
    """Index of the first valid query of the observation window, int32 [B]."""
    later = valid.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
    return (later > rule[Observation].queries).sum(-1, dtype=torch.int32)


def config(call: Call, rule: Rule, on: Target) -> dict[str, int]:
    """Block sizes of statistics_kernel (BN keys stay, BM queries stream), chosen as in `providers.triton`."""
    dim, bytes_each = call.q.shape[3], call.q.element_size()
    if on.kind == "interpret":
        return block_sizes(16, 32, 4, 1)
    if on.kind == "hip":
        small = block_sizes(64, 64, 4, 1) if dim <= 64 else block_sizes(16, 64, 8, 1)
        return block_sizes(32, 32, 4, 1) if bytes_each > 2 else small
    if bytes_each > 2 and on.arch >= 100 and dim <= 128:
        return block_sizes(16, 32, 4, 2)
    if bytes_each > 2:
        return block_sizes(16, 64, 4, 2) if dim <= 128 else block_sizes(32, 16, 8, 1)
    if dim > 128 or on.arch < 90:
        return block_sizes(64 if dim <= 64 else 16 if dim > 128 and on.arch >= 100 else 32, 64, 4, 2)
    if call.survey is not None or call.pos is not None:
        return block_sizes(64, 64, 4, 3) if dim in (64, 128) and on.arch < 100 else block_sizes(32, 64, 4, 2)
    if emission(rule, "sumsq") >= 0 or rule[Observation].group != "mean":  # gathers a group's heads in one more tile
        return block_sizes(32, 64, 4, 2)
    sees = call.shown.sees
    return block_sizes(64, 64 if sees.window or sees.chunk or on.arch >= 100 else 128, 4, 3)
