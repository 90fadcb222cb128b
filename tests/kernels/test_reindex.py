"""Keys turned to their places in the cache, against rotation matrices in float64."""

from __future__ import annotations

import pytest
import torch
from kvpass.kernels.after_call.reindex import checked, new_places, reindex, step_at, step_between, turns_of
from kvpass.kernels.errors import RotationError
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.state import State

RULE = Rule(stats=("place",), reindex=True, slots=4)
STEP = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)


def angles(positions: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [B, S, 3], as transformers computes them."""
    one = positions[..., None].float() * STEP.float()
    return one.cos() * scale, one.sin() * scale


def rotated(x: torch.Tensor, position: float) -> torch.Tensor:
    """x [6] at a position."""
    out = torch.empty(6, dtype=torch.float64)
    for f in range(3):
        c, s = (position * STEP[f]).cos(), (position * STEP[f]).sin()
        out[f], out[f + 3] = x[f] * c - x[f + 3] * s, x[f + 3] * c + x[f] * s
    return out


@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("most", [1, 40, 2**16])
def test_the_step_of_a_function_of_positions(most: int, scale: float) -> None:
    asked = []

    def turn(at: int) -> torch.Tensor:
        asked.append(at)
        return turns_of(*angles(torch.full((2, 5), at), scale))

    found = step_at(turn, most)
    assert found is not None
    assert max(asked) <= most
    torch.testing.assert_close(found, STEP.float().double(), atol=2e-7 / max(asked), rtol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda at: angles(torch.arange(5)[None] + at * torch.arange(5)),  # not the same for all tokens
        lambda at: angles(torch.full((1, 5), 7)),  # no function of what was set
        lambda at: angles(torch.full((1, 5), at / (2.0 if at > 100 else 1.0))),  # frequencies that change with length
    ],
)
def test_what_is_no_rotation_by_equal_steps_gives_none(wrong) -> None:
    assert step_at(lambda at: turns_of(*wrong(at))) is None


@pytest.mark.parametrize("start", [0, 5000])
def test_the_step_between_kept_neighbours(start: int) -> None:
    """Padding and evicted tokens do not count, wherever the caller let them stand."""
    positions = torch.arange(start, start + 300).repeat(2, 1)
    place = torch.arange(300.0).repeat(2, 1)
    positions[1, :200], place[1, :200] = 1, -1
    place[1, 200:], positions[1, 200:] = torch.arange(100.0), torch.arange(100)
    place[:, 220:290] = -1
    found = step_between(turns_of(*angles(positions)), place)
    assert found is not None
    torch.testing.assert_close(found, STEP, atol=3e-6, rtol=0)
    place[:, ::2] = -1
    assert step_between(turns_of(*angles(positions)), place) is None


def test_places_are_checked_row_by_row_and_call_by_call() -> None:
    place = torch.tensor([[0.0, 1, 2, -1, 4], [-1, -1, 0, 1, 2]])
    positions = torch.tensor([[0, 1, 2, 3, 4], [1, 1, 70, 71, 72]])  # a row may begin anywhere
    zero = checked(turns_of(*angles(positions)), place, STEP, None)
    torch.testing.assert_close(zero[1].angle().cos(), (70 * STEP).cos(), atol=1e-5, rtol=0)
    more = torch.tensor([[5, 1], [73, 74]])
    checked(turns_of(*angles(more)), torch.tensor([[5.0, -1], [3, 4]]), STEP, zero)
    with pytest.raises(RotationError, match="row 1 do not rise by one"):
        checked(turns_of(*angles(more)), torch.tensor([[5.0, -1], [3, 5]]), STEP, zero)
    with pytest.raises(RotationError, match="row 0 do not rise by one"):
        checked(turns_of(*angles(2 ** torch.arange(10)[None])), torch.arange(10.0)[None], STEP, None)


def test_places_of_a_call_are_what_any_head_kept() -> None:
    pos = torch.tensor([[[9, 2, 7, -1], [8, 9, 0, -1]]], dtype=torch.int32)
    stats = torch.tensor([[[[7.0, 2, 5, 0], [6, 7, 0, 0]]]])
    cursor = torch.tensor([[[3, 3, 8, 0]] * 2], dtype=torch.int32)
    state = State([torch.zeros(1, 2, 4, 6), torch.zeros(1, 2, 4, 6), pos, stats, cursor])
    assert new_places(state, RULE, 6, 4).tolist() == [[-1, 5, 6, 7]]


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
    state = State([k, torch.zeros(1, 2, 5, 6), pos, pos[None].float(), cursor])
    for _ in range(2):
        reindex(state, RULE, STEP)
        for h, positions in enumerate(kept):
            for place, p in enumerate(positions):
                wanted = rotated(plain[0, h, p], 6 + place).float()  # the newest stays at 9
                torch.testing.assert_close(state.k[0, h, 3 - place], wanted, atol=1e-6, rtol=0)
    assert state.stats[0, 0].tolist() == [[9, 8, 7, 6, -1]] * 2
