"""masks: the exact recognition of causal masks, and look-ups by position."""

import pytest
import torch
from kvpass.kernels.attention.masks import (
    at_positions,
    by_kv_head,
    causal_span,
    check_shown,
    count_shown,
    simplified,
    visible,
    written,
)
from kvpass.kernels.attention.visibility import Sees, Shown
from kvpass.kernels.errors import MaskError
from kvpass.kernels.testing import causal_mask


def test_causal_spans_are_found():
    for size in (1, 5, 256, 300, 515):
        assert causal_span(causal_mask(size, size)[0, 0]) == (0, size)
    assert causal_span(causal_mask(300, 300, left=[7], right=[20])[0, 0]) == (7, 280)
    assert causal_span(causal_mask(9, 9, left=[8])[0, 0]) == (8, 9)


def test_one_wrong_bit_anywhere_is_noticed():
    size = 300
    base = causal_mask(size, size, left=[3], right=[4])[0, 0]
    g = torch.Generator().manual_seed(0)
    for row, column in torch.randint(0, size, (200, 2), generator=g).tolist():
        wrong = base.clone()
        wrong[row, column] = ~wrong[row, column]
        assert causal_span(wrong) is None, (row, column)


def test_other_shapes_are_not_causal():
    assert causal_span(torch.zeros(8, 8, dtype=torch.bool)) is None
    assert causal_span(torch.ones(8, 8, dtype=torch.bool)) is None
    assert causal_span(torch.ones(8, 8, dtype=torch.bool).triu()) is None


def test_lookup_by_position():
    mask = torch.arange(2 * 4 * 3 * 10).view(2, 4, 3, 10).float()
    pos = torch.tensor([[[9, 0, -1], [3, 3, 2]], [[5, 6, 7], [8, -1, 1]]], dtype=torch.int32)
    got = at_positions(by_kv_head(mask, 2), pos)
    assert got.shape == (2, 2, 2, 3, 3)
    for b in range(2):
        for h in range(4):
            for j, p in enumerate(pos[b, h // 2].tolist()):
                if p >= 0:
                    assert torch.equal(got[b, h // 2, h % 2, :, j], mask[b, h, :, p])


def test_visible_threshold_and_arrivals():
    smallest = torch.finfo(torch.float16).min
    mask = torch.tensor([[[[0.0, smallest, smallest / 2, -1000.0]]]], dtype=torch.float16)
    assert visible(mask).flatten().tolist() == [True, False, False, True]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        wide = torch.tensor([-1e9, -2e8, -1e7, -float("inf")], dtype=dtype)
        assert visible(wide).tolist() == [False, False, True, False]
    assert Shown(Sees(), 2, 2, mask=mask).arrived(2, mask.device).tolist() == [[False, True]] * 2
    assert Shown(Sees(), 2).arrived(1, mask.device).tolist() == [[True, True]]


def test_float_masks_that_only_switch_become_bool():
    smallest = torch.finfo(torch.float32).min
    causal = causal_mask(6, 6)
    for hidden in (smallest, -1e9, -torch.inf):
        assert torch.equal(simplified(torch.zeros(causal.shape).masked_fill(~causal, hidden)), causal)
    biased = torch.zeros(causal.shape).masked_fill(~causal, smallest)
    biased[..., 2, 1] = -0.5
    assert simplified(biased) is biased
    assert simplified(causal) is causal


def shows(*rows: str) -> torch.Tensor:
    """[B, 1, 1, T] bool of rows of x (shown) and . (hidden)."""
    return torch.tensor([[[[c == "x" for c in row]]] for row in rows])


def test_what_was_taken_for_padding_must_stay_hidden():
    """Two rows of four tokens, of which 4 and 2 were valid, and a new one."""
    seen = torch.tensor([4, 2])
    for mask in (shows("xxxxx", "..xxx"), shows("..xxx"), shows("....x"), shows("xxxxx", "xx..x")):
        check_shown(count_shown(mask, 4), seen)
        check_shown(count_shown(torch.where(mask, 0.0, -1e9), 4), seen)
    for mask in (shows("xxxxx"), shows("xxxxx", ".xxxx"), torch.ones(1, 1, 1, 1, dtype=torch.bool)):
        with pytest.raises(MaskError, match="padding") as caught:
            check_shown(count_shown(mask, 4), seen)
        assert caught.value.hint
    check_shown(4, torch.tensor([4, 4]))
    check_shown(count_shown(torch.zeros(1, 1, 1, 1, dtype=torch.bool), 4), seen)


def test_one_query_of_one_head_is_enough():
    mask = torch.zeros(1, 3, 2, 6, dtype=torch.bool)
    mask[0, 1, 1, :3] = True
    check_shown(count_shown(mask, 4), torch.tensor([3]))
    with pytest.raises(MaskError):
        check_shown(count_shown(mask, 4), torch.tensor([2]))


def test_nothing_beyond_what_is_written():
    assert torch.equal(written(shows("xx...."), 3), shows("xx."))
    with pytest.raises(MaskError, match="beyond the 3 tokens"):
        written(shows("xx.x.."), 3)
