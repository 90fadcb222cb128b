"""What tests and benchmarks of the kernels share: inputs, states, comparison. Pure torch, imports no test framework."""

from __future__ import annotations

import torch
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import FIRST, FREE, LIVE, SEEN
from kvpass.kernels.slots.state import State
from kvpass.kernels.slots.statistics import Statistics
from torch import Tensor

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    # float32: a softmax over some thousand keys sums in another order, and torch's CPU flash kernel uses a fast exp of
    # about 20 good bits; both stay under 1e-5 of values of order 1.
    torch.float32: (2e-5, 1e-5),
    # float16 keeps 11 bits (2^-11 = 5e-4): probabilities and outputs are rounded once each, products add in float32.
    torch.float16: (2e-3, 2e-3),
    # bfloat16 keeps 8 bits (2^-8 = 4e-3): the same two roundings.
    torch.bfloat16: (2e-2, 2e-2),
}
"""(absolute, relative) by the dtype of the inputs, for values of order 1. Integers are compared exactly."""

STATS_TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    # Statistics are float32 whatever the model's dtype; sums over queries grow, so the relative part carries them.
    torch.float32: (2e-5, 1e-4),
    # Half-precision attention saves a log-sum-exp of logits whose inputs were rounded the same way on both sides, so
    # only the internal rounding of the flash kernel is left.
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1e-2, 1e-2),
}
"""(absolute, relative) for statistics, by the dtype of the inputs."""


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, *, stats: bool = False, what: str = "value"
) -> None:
    """Compare with the tolerance of the inputs' dtype (default: that of `actual`); integers and bools exactly.

    Raises AssertionError, naming `what`, on a difference, a NaN or another shape.
    """
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    if not actual.is_floating_point():
        torch.testing.assert_close(actual, expected.to(actual.dtype), atol=0, rtol=0, msg=lambda m: f"{what}: {m}")
        return
    absolute, relative = (STATS_TOLERANCES if stats else TOLERANCES)[dtype or actual.dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), atol=absolute, rtol=relative, msg=lambda m: f"{what}: {m}"
    )


def qkv(
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    dim: int,
    *,
    keys: int | None = None,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q [B, Hq, S, D], k [B, Hkv, L, D], v [B, Hkv, L, Dv]; the same numbers on every device."""
    g = torch.Generator().manual_seed(seed)
    keys, value_dim = keys or queries, value_dim or dim
    shapes = ((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, value_dim))
    q, k, v = (torch.randn(s, generator=g).to(device, dtype) for s in shapes)
    return q, k, v


def empty_state(
    batch: int,
    kv_heads: int,
    slots: int,
    dim: int,
    rule: Rule,
    *,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> State:
    """A state with no token in it; statistics, and k and v of slots, are poisoned with NaN."""
    like = torch.empty(0, dtype=dtype, device=device)
    state = State.empty(rule, like, B=batch, H=kv_heads, C=slots, D=dim, V=value_dim or dim)
    for field, tensor in state.per_slot():
        if field.name in ("k", "v", "stats"):
            tensor.fill_(float("nan"))
    return state


def random_state(
    live: Tensor,
    slots: int,
    dim: int,
    rule: Rule,
    *,
    seen: int,
    holes: bool = True,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> State:
    """A state with live[b, h] used slots after `seen` tokens; empties hold NaN.

    live: int [B, Hkv]. With `holes`, FREE is a random slot in 0 .. LIVE, as after evictions; else FREE == LIVE.
    Positions are distinct, below `seen`, in no order; statistics are non-negative. Raises ValueError if live does
    not fit.
    """
    batch, heads = live.shape
    if int(live.max()) >= slots or int(live.max()) > seen:
        raise ValueError(f"live {int(live.max())} must be below {slots} slots and within {seen} tokens seen")
    g = torch.Generator().manual_seed(seed)
    state = empty_state(batch, heads, slots, dim, rule, value_dim=value_dim, dtype=dtype)
    for b in range(batch):
        for h in range(heads):
            n = int(live[b, h])
            free = int(torch.randint(n + 1, (), generator=g)) if holes else n
            used = [s for s in range(n + 1) if s != free]
            for entries in (state.k, state.v):
                entries[b, h, used] = torch.randn(n, entries.shape[-1], generator=g).to(dtype)
            state.cursor[b, h] = torch.tensor([n, free, seen, 0])
            _draw(state, (b, h), used, seen, rule, g)
    return state.mapped(lambda _, tensor: tensor.to(device))


def _draw(
    state: State, head: tuple[int, int], used: list[int], seen: int, rule: Rule, generator: torch.Generator
) -> None:
    """Positions and statistics of one head's used slots."""
    state.pos[(*head, used)] = torch.randperm(seen, generator=generator)[: len(used)].int()
    for i, name in enumerate(rule[Statistics].stats):
        values = torch.rand(len(used), generator=generator)
        scale = {"sum": 3.0, "sumsq": 4.0, "count": 0.0}[name]
        state.stats[(i, *head, used)] = values * scale if name != "count" else (1 + values * 5).floor()


def causal_mask(
    queries: int, keys: int, *, left: list[int] | None = None, right: list[int] | None = None, device: str = "cpu"
) -> Tensor:
    """The bool mask [B or 1, 1, S, T] of a causal model whose rows are padded by left[b] and right[b] tokens.

    Query i is at position T - S + i.
    """
    row = torch.arange(keys - queries, keys, device=device)[:, None]
    column = torch.arange(keys, device=device)
    rows = max(len(left or [0]), len(right or [0]))
    masks = []
    for b in range(rows):
        first, last = (left or [0] * rows)[b], keys - (right or [0] * rows)[b]
        masks.append((column <= row) & (column >= first) & (column < last))
    return torch.stack(masks)[:, None]


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor, for comparisons in which NaN equals NaN."""
    return x.contiguous().view(torch.uint8)


__all__ = [
    "FIRST",
    "FREE",
    "LIVE",
    "SEEN",
    "STATS_TOLERANCES",
    "TOLERANCES",
    "State",
    "assert_close",
    "bits",
    "causal_mask",
    "empty_state",
    "qkv",
    "random_state",
]
