"""masks: the exact recognition of causal masks, and look-ups by position."""

import torch
from kvpass.kernels.masks import arrivals, at_positions, by_kv_head, causal_span, simplified, visible
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
    assert arrivals(mask, 2, 2, 2, mask.device).tolist() == [[False, True]] * 2
    assert arrivals(None, 1, 2, 0, mask.device).tolist() == [[True, True]]


def test_float_masks_that_only_switch_become_bool():
    smallest = torch.finfo(torch.float32).min
    causal = causal_mask(6, 6)
    for hidden in (smallest, -1e9, -torch.inf):
        assert torch.equal(simplified(torch.zeros(causal.shape).masked_fill(~causal, hidden)), causal)
    biased = torch.zeros(causal.shape).masked_fill(~causal, smallest)
    biased[..., 2, 1] = -0.5
    assert simplified(biased) is biased
    assert simplified(causal) is causal
