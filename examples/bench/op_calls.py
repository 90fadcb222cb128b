"""Calls of decode_attend as a model makes them: noted in a step, so that they can be made again, timed and counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import FREE, LIVE, SHIFT
from kvpass.kernels.slots.ragged import is_ragged
from kvpass.kernels.slots.state import State
from spelling import cache_of, with_cache
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kvpass
import kvpass.ops  # registers the ops
from kvpass.runtime.bind import Bound

OP = torch.ops.kvpass.decode_attend


class Call:
    """One call of the op: its arguments by name, with a state of its own."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = {**given, "state": [t.clone() for t in given["state"]]}
        self.begin = given["position"], self.state.cursor.clone()

    def again(self) -> Call:
        return Call(self.given)

    def run(self) -> Tensor:
        """Takes the step, and makes ready for the next one at the next position."""
        out: Tensor = OP(**self.given)
        self.given["position"] += 1
        return out

    @property
    def rule(self) -> Rule:
        return Rule.parse(self.given["rule"])

    @property
    def state(self) -> State:
        return State.of(self.given["state"], self.rule)

    @property
    def ragged(self) -> bool:
        """Whether heads hold different numbers of tokens."""
        live = self.state.cursor[..., LIVE]
        return bool((live != live.flatten()[0]).any())

    def ready(self) -> None:
        """Makes room for one more token where all slots are in use, as happens where nothing is evicted: forgets those
        that `run` brought.
        """
        if not is_ragged(self.state.cursor) and bool((self.state.cursor[..., LIVE] >= self.state.slots).any()):
            self.given["position"], cursor = self.begin
            self.state.cursor.copy_(cursor)

    def live_bytes(self) -> int:
        """Bytes of keys and values, codes, scales and whole copies of the tokens that are held: what must be read."""
        return self._bytes(lambda field: field.entries)

    def stats_bytes(self) -> int:
        """Bytes of the statistics of the tokens that are held: read and written where a step observes."""
        return self._bytes(lambda field: field.name == "stats")

    def _bytes(self, wanted: Any) -> int:
        state = self.state
        live, heads = int(state.cursor[..., LIVE].sum()), state.cursor[..., LIVE].numel()
        total = 0
        for field, tensor in zip(state.fields, state.tensors(), strict=True):
            if not wanted(field) or not tensor.numel():
                continue
            if field.per_slot:
                total += live * tensor.nbytes // (heads * state.slots)
            else:
                total += tensor.nbytes
        return total


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is OP.default:
            names = [one.name for one in func._schema.arguments]
            self.calls.append(Call({**dict(zip(names, args, strict=False)), **(kwargs or {})}))
        return func(*args, **(kwargs or {}))


@contextmanager
def noted() -> Iterator[list[Call]]:
    """The calls of compiled models whose graphs run node by node, as they were before they changed their states."""
    mode, run = _Noting(), Bound._run

    def noting(self: Bound, *given: Any) -> Any:
        with mode:
            return run(self, *given)

    with patch.object(Bound, "_run", noting):
        yield mode.calls


def calls_of_a_step(model: Any, policy: Any, budget: Any, ids: Tensor) -> list[Call]:
    """Of the third step behind a prompt, one a layer. ids [B, T], of which the last three columns are the steps'."""
    compiled = kvpass.compile(model, policy, budget, inner="eager")
    cache: Any = None
    found: list[Call] = []
    for tokens in (ids[:, :-3], *ids[:, -3:].split(1, dim=1)):
        with noted() as calls:
            out = compiled(input_ids=tokens, **with_cache(compiled, cache), use_cache=True, logits_to_keep=1)
        cache, found = cache_of(out), calls
    return found


def expected(call: Call) -> Tensor:
    """What the op must give, by its definition, in float64; None of masks, memory keys, caps and sinks is known here.

    Raises ValueError for such a call, and for slots that hold codes.
    """
    given, state = call.given, call.state
    odd = [name for name in ("mask", "sinks", "memory_k", "memory_v") if given.get(name) is not None]
    if odd or given.get("softcap") or given.get("latent") or not state.k.is_floating_point():
        raise ValueError(f"not a plain call: {odd}")
    if [field.name for field in state.fields if field.name == "bias"]:
        raise ValueError("not a plain call: slots with a bias")
    q, k_new, v_new = (given[name].double() for name in ("q", "k_new", "v_new"))
    rows, heads = k_new.shape[:2]
    group, out = q.shape[1] // heads, q.new_empty(rows, q.shape[1], 1, v_new.shape[3])
    k, v = (entries.flatten(0, 2).double() for entries in (state.k, state.v))
    for row in range(rows):
        for head in range(heads):
            cursor = state.cursor[row, head].tolist()
            begin = (row * heads + head) * state.slots + (cursor[SHIFT] if is_ragged(state.cursor) else 0)
            used = [begin + slot for slot in range(cursor[LIVE] + 1) if slot != cursor[FREE]]
            for one in range(head * group, (head + 1) * group):
                logits = torch.cat([k[used], k_new[row, head]]) @ q[row, one, 0] * given["scale"]
                out[row, one, 0] = logits.softmax(0) @ torch.cat([v[used], v_new[row, head]])
    return out
