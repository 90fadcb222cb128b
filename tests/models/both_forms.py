"""Steps of decode_attend as the device does them, beside the reference: the same, and nothing read back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.decode_attend.call import Call, Token
from kvpass.kernels.decode_attend.device import decode_attend_device
from kvpass.kernels.decode_attend.reference import decode_attend_reference
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.state import State
from kvpass.kernels.testing import assert_close, qkv
from models.states import arriving, same, state_under
from models.unread import unread

SEEN = 240
KINDS = ("none", "tokens", "pads", "bias")
"""What a step is told: nothing; that the caller dropped tokens of row 1; that tokens of row 0 are padding too; all that
as an additive mask with numbers besides.
"""


def steps_in_both_forms(rule: Rule, kind: str, steps: int = 4) -> Iterator[tuple[State, State]]:
    """The state before and after each step; outputs and states are compared."""
    got = state_under(rule, SEEN)
    want = got.clone()
    for step in range(steps):
        position = SEEN + step
        token = Token(*qkv(2, 4, 2, 1, 16, keys=1, seed=step), arriving(rule, position))
        tokens = torch.ones(2, position + 1, dtype=torch.bool)
        tokens[1, 100:130] = False
        tokens[0, SEEN + 1 :: 2] &= kind != "pads"
        told: dict[str, Any] = {} if kind == "none" else {"tokens": tokens}
        mask = None
        if kind == "bias":
            noise = torch.randn(2, 4, 1, position + 1, generator=torch.Generator().manual_seed(step))
            mask, told = noise.masked_fill(~tokens[:, None, None], torch.finfo(torch.float32).min), {}
        before = got.clone()
        call = Call.of_step(mask, position, Softmax(0.3), rule, **told)
        there = Call.of_step(mask, 0, Softmax(0.3), rule, **told, at=torch.tensor([position], dtype=torch.int32))
        with unread():
            x = decode_attend_device(token, got, there)
        y = decode_attend_reference(token, want, call)
        assert_close(x, y, what=f"out at step {step}")
        same(got, want, before, step)
        yield before, want
