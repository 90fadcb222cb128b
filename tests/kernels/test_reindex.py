"""Keys turned to their places in the cache, against rotation matrices in float64."""

from __future__ import annotations

import pytest
import torch
from kvpass.kernels.errors import RotationError
from kvpass.kernels.reindex import reindex, step_of
from kvpass.kernels.rule import Rule

RULE = Rule(stats=("place",), reindex=True, slots=4)
STEP = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)


def angles(positions: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [B, S, 6], as transformers computes them."""
    one = positions[..., None].float() * STEP.float()
    both = torch.cat([one, one], -1)
    return both.cos() * scale, both.sin() * scale


def rotated(x: torch.Tensor, position: float) -> torch.Tensor:
    """x [6] at a position."""
    out = torch.empty(6, dtype=torch.float64)
    for f in range(3):
        c, s = (position * STEP[f]).cos(), (position * STEP[f]).sin()
        out[f], out[f + 3] = x[f] * c - x[f + 3] * s, x[f + 3] * c + x[f] * s
    return out


@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("start", [0, 5000])
def test_the_step_of_a_call(start: int, scale: float) -> None:
    found = step_of(*angles(torch.arange(start, start + 300)[None], scale))
    assert found is not None
    torch.testing.assert_close(found, STEP, atol=3e-6, rtol=0)


def test_padding_does_not_count_and_gaps_are_refused() -> None:
    padded = torch.stack([torch.arange(50), (torch.arange(50) - 20).clamp(min=0)])
    found = step_of(*angles(padded))
    assert found is not None
    torch.testing.assert_close(found, STEP, atol=1e-6, rtol=0)
    with pytest.raises(RotationError, match="do not rise by one"):
        step_of(*angles(2 ** torch.arange(10)[None]))
    assert step_of(*angles(torch.tensor([[7]]))) is None


def test_keys_move_together_and_only_once() -> None:
    g = torch.Generator().manual_seed(0)
    plain = torch.randn(1, 2, 20, 6, generator=g, dtype=torch.float64)
    kept = [[0, 1, 5, 9], [3, 4, 8, 9]]
    k = torch.zeros(1, 2, 5, 6)
    pos = torch.full((1, 2, 5), -1, dtype=torch.int32)
    for h, positions in enumerate(kept):
        for slot, p in enumerate(reversed(positions)):  # slots are in no order
            pos[0, h, slot], k[0, h, slot] = p, rotated(plain[0, h, p], p).float()
    cursor = torch.tensor([[[4, 4, 10, 0]] * 2], dtype=torch.int32)
    state = [k, torch.zeros(1, 2, 5, 6), pos, pos[None].float(), cursor]
    with pytest.raises(RotationError, match="one token only"):
        reindex(state, RULE, None)
    for _ in range(2):
        reindex(state, RULE, STEP)
        for h, positions in enumerate(kept):
            for place, p in enumerate(positions):
                wanted = rotated(plain[0, h, p], 6 + place).float()  # the newest stays at 9
                torch.testing.assert_close(state[0][0, h, 3 - place], wanted, atol=1e-6, rtol=0)
    assert state[3][0, 0].tolist() == [[9, 8, 7, 6, -1]] * 2
