"""The kernels alone, beside torch's attention: causal prefill, a decode step, selection and compaction.

bfloat16, 32 query heads on 8 KV heads of 128. A row's `difference` is from torch's attention on the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu.device import DEVICE, GPU, difference, median_ms, replayed_ms, triton, unsynced
from gpu.record import Record
from kvpass.kernels.compact_slots import compact_slots
from kvpass.kernels.decode_attend import decode_attend
from kvpass.kernels.prefill_attend import prefill_attend
from kvpass.kernels.rule import Rule
from kvpass.kernels.select_slots import select_slots
from kvpass.kernels.slots.state import State
from kvpass.kernels.testing import causal_mask, empty_state
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvpass.plan.rule import rule_of
from kvpass.policy.policy import Policy

HEADS, KV_HEADS, DIM = (32, 8, 128) if GPU else (2, 1, 16)
DTYPE = torch.bfloat16 if GPU else torch.float32
SCALE = DIM**-0.5
PREFILLS = (2048, 8192, 32768) if GPU else (32,)
MASKED_UP_TO = 8192
"""A mask that is a tensor: tried up to this length."""
TRIED = (("full", False), ("snapkv", False), ("h2o", False), ("full", True), ("h2o", True))
"""Policy, and whether the causal mask is given as a tensor."""
STEPS = ((1, 8192), (1, 32768), (8, 8192), (32, 2048), (32, 8192)) if GPU else ((1, 32),)
"""Batch, slots."""
SELECTED = ((1, 8192), (1, 32768), (8, 4096)) if GPU else ((1, 32),)
"""Batch, tokens; a fifth is kept."""
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION} if GPU else {}
ALLOWED = 2e-2 if GPU else 1e-5
"""Relative difference from torch's attention: two roundings of bfloat16 are 4e-3."""


def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def checked(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    gap = difference(ours, theirs)
    assert gap <= ALLOWED, f"differs from torch's attention by {gap:.2g}"  # NaN is not <=
    return {"difference": gap}


def rates(ms: float, operations: float = 0, moved: float = 0) -> dict[str, Any]:
    """`operations` as TFLOP/s, bytes `moved` as GB/s."""
    found = {"ms": ms}
    found |= {"tflop_per_s": operations / ms / 1e9} if operations else {}
    return found | ({"gb_per_s": moved / ms / 1e6} if moved else {})


def rule(policy: str, slots: int | float) -> str:
    return Rule().encode() if policy == "full" else rule_of(Policy.load(policy).with_budget(slots)).encode()


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's causal attention, by the backend that is allowed or else the one that it chooses."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def prefill(call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    found = checked(call(q, k, v), attended(q, k, v))
    return found | rates(median_ms(partial(call, q, k, v)), operations=2 * HEADS * DIM * q.shape[2] ** 2)


def prompt(length: int) -> list[Tensor]:
    return [random(1, heads, length, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def torch_prefill(length: int, backend: SDPBackend) -> dict[str, Any]:
    q, k, v = prompt(length)
    with sdpa_kernel(backend):
        try:
            attended(q, k, v)
        except RuntimeError:  # this backend takes no groups: hand it all heads
            k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        return {"groups": k.shape[1] == KV_HEADS} | prefill(attended, q, k, v)


def kvpass_prefill(length: int, policy: str, masked: bool) -> dict[str, Any]:
    mask = causal_mask(length, length, device=DEVICE) if masked else None
    encoded = rule(policy, 0.2)
    return prefill(lambda *x: prefill_attend(*x, None, mask, SCALE, not masked, encoded)[0], *prompt(length))


def prefills(record: Record) -> None:
    for length in PREFILLS:
        row = {"kernel": "prefill", "batch": 1, "tokens": length}
        for name, backend in BACKENDS.items():
            record.attempt(row | {"what": f"torch, {name}"}, partial(torch_prefill, length, backend))
        for policy, masked in TRIED:
            if not masked or length <= MASKED_UP_TO:
                what = f"kvpass {policy}, mask given" if masked else f"kvpass {policy}"
                record.attempt(row | {"what": what}, partial(kvpass_prefill, length, policy, masked))


def state_of(encoded: str, batch: int, live: int) -> State:
    """`live` slots in use, in the order of their positions, and a few to spare."""
    state = empty_state(batch, KV_HEADS, live + 8, DIM, Rule.parse(encoded), dtype=DTYPE, device=DEVICE)
    state.k.normal_()
    state.v.normal_()
    state.stats.uniform_()
    state.pos[..., :live] = torch.arange(live, device=DEVICE, dtype=torch.int32)
    state.cursor[:] = cursor_of(live, live, batch)
    return state


def cursor_of(live: int, seen: int, batch: int) -> Tensor:
    cursor = torch.tensor([live, live, seen, 0], dtype=torch.int32, device=DEVICE)
    return cursor.expand(batch, KV_HEADS, 4).contiguous()


def step(policy: str, batch: int, slots: int) -> dict[str, Any]:
    """One token, its position on the device. `full` would grow: its cursor is set back before each call, one small
    launch more.
    """
    encoded = rule(policy, slots)
    at = torch.tensor([slots], dtype=torch.int32, device=DEVICE)
    state = state_of(encoded, batch, slots)
    new, start = [random(batch, heads, 1, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)], state.cursor.clone()
    keys, values = (torch.cat([held[:, :, :slots], x], 2) for held, x in ((state.k, new[1]), (state.v, new[2])))

    def call() -> Tensor:
        if policy == "full":
            state.cursor.copy_(start)
        return decode_attend(*new, None, state.tensors(), 0, SCALE, encoded, at=at)

    found = checked(call(), scaled_dot_product_attention(new[0], keys, values, enable_gqa=True))
    del keys, values
    with unsynced():  # the kernels are compiled by now
        call()
    return found | both(call, batch, slots)


def torch_step(batch: int, slots: int) -> dict[str, Any]:
    q, k, v = (random(batch, heads, n, DIM) for heads, n in ((HEADS, 1), (KV_HEADS, slots), (KV_HEADS, slots)))
    return both(lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True), batch, slots)


def both(call: Callable[[], Any], batch: int, slots: int) -> dict[str, Any]:
    """As it is called, and replayed from a CUDA graph: GB/s of keys and values read."""
    moved = batch * KV_HEADS * slots * 2 * DIM * DTYPE.itemsize
    replayed = replayed_ms(call)
    return rates(median_ms(call), moved=moved) | (
        {} if replayed is None else {"replayed": rates(replayed, moved=moved)}
    )


def steps(record: Record) -> None:
    for batch, slots in STEPS:
        row = {"kernel": "decode", "batch": batch, "slots": slots}
        record.attempt(row | {"what": "torch, enable_gqa"}, partial(torch_step, batch, slots))
        for policy in ("full", "h2o", "snapkv", "tova", "roco", "knorm") if GPU else ("full", "h2o"):
            record.attempt(row | {"what": f"kvpass {policy}"}, partial(step, policy, batch, slots))


def selection(batch: int, tokens: int) -> dict[str, Any]:
    score, cursor = torch.rand(batch, KV_HEADS, tokens, device=DEVICE), cursor_of(tokens // 5, tokens, batch)
    return rates(median_ms(lambda: select_slots(score, cursor, tokens // 5)))


def compaction(batch: int, tokens: int) -> dict[str, Any]:
    """GB/s of the kept keys and values, read and written."""
    kept, encoded = tokens // 5, rule("h2o", 0.2)
    state, cursor = state_of(encoded, batch, kept), cursor_of(kept, tokens, batch)
    k, v = (random(batch, KV_HEADS, tokens, DIM) for _ in range(2))
    stats = torch.rand(1, batch, KV_HEADS, tokens, device=DEVICE)
    chosen = select_slots(stats[0], cursor, kept)
    ms = median_ms(lambda: compact_slots((k, v, None, stats), chosen, cursor, state.tensors(), encoded))
    return rates(ms, moved=2 * batch * KV_HEADS * kept * 2 * DIM * DTYPE.itemsize)


def selections(record: Record) -> None:
    """After a prefill: which tokens stay, and their move into slots."""
    for batch, tokens in SELECTED:
        for name, measure in (("select", selection), ("compact", compaction)):
            row = {"kernel": name, "batch": batch, "tokens": tokens, "what": "kvpass, a fifth kept"}
            record.attempt(row, partial(measure, batch, tokens))


if __name__ == "__main__":
    record = Record("kernels", DEVICE, shape={"heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM, "dtype": str(DTYPE)})
    with triton(), torch.no_grad():
        prefills(record)
        steps(record)
        selections(record)
    record.finish()
