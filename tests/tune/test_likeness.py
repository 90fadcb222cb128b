"""The divergence, against the sum over all tokens in float64."""

from __future__ import annotations

import torch

from kvpass.tune.likeness import LIKELIEST, divergence, outlook


def whole(full: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    p, q = full.double().log_softmax(-1), kept.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def test_small_vocabularies_are_exact():
    full, kept = torch.randn(5, 97), torch.randn(5, 97)
    torch.testing.assert_close(divergence(outlook(full), kept).double(), whole(full, kept), atol=1e-5, rtol=1e-5)


def test_large_ones_are_a_lower_bound_and_close_where_the_likeliest_have_the_mass():
    full = 4 * torch.randn(7, 20 * LIKELIEST)
    kept = full + torch.randn_like(full)
    told, exact = divergence(outlook(full), kept).double(), whole(full, kept)
    assert (told <= exact + 1e-6).all()
    assert (told > 0.7 * exact).all()


def test_it_is_nothing_for_the_same_logits_and_finite_where_nothing_is_left():
    full = torch.tensor([[50.0, *[-1e4] * 30]])
    assert float(divergence(outlook(full), full)) == 0.0
    assert float(divergence(outlook(full), torch.zeros(1, 31))) > 3
