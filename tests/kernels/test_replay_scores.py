"""replay_scores: the vectors of shared/policies-2.md S1 by hand, and a call that repeats nothing."""

from __future__ import annotations

import torch
from kvpass.kernels.rank.replay import UNHEARD, replay_scores
from kvpass.kernels.rule import Rule

LOGITS = torch.tensor([[0.0, 1.0, 2.0, 0.0, 9.0], [0.0, 2.0, 1.0, 0.0, 0.0]])
"""Of two queries: a sink, the two keys that they repeat, and themselves; the first does not see the second."""

RULE = Rule(stats=("scored", "number"), replay=2, sinks=1)


def scores(rule: Rule, span: tuple[int, int], extra: int = 0, **more: torch.Tensor) -> torch.Tensor:
    """One head. extra: keys between the sink and the repeated ones, which the softmax must not see."""
    columns = torch.cat([LOGITS[:, :1], torch.full((2, extra), 5.0), LOGITS[:, 1:]], 1)
    length = columns.shape[1]
    k, q = torch.eye(length)[None, None], columns[None, None]
    pos = torch.arange(length, dtype=torch.int32)[None, None]
    stats = torch.zeros(2, 1, 1, length)
    stats[1] = pos.float()
    cursor = torch.tensor([[[length - 2, length - 2, length - 2, 0, 0, 0]]], dtype=torch.int32)
    v = torch.tensor([1.0] * (1 + extra) + [2.0, 1.0, 1.0, 1.0])[None, None, :, None]
    valid, repeated = torch.ones(1, 2, dtype=torch.bool), torch.tensor([span], dtype=torch.int32)
    told = {"position": length - 2, **more}
    return replay_scores(q, k, v, pos, None, valid, stats, cursor, repeated, 1.0, "causal", rule.encode(), **told)[0, 0]


def test_by_hand() -> None:
    got = scores(RULE, (1, 3))
    torch.testing.assert_close(got[1:3], torch.tensor([0.563734, 0.610296]), atol=1e-6, rtol=0)
    assert got[[0, 3, 4]].tolist() == [UNHEARD] * 3


def test_by_hand_normed() -> None:
    """||v W_O|| of the two keys is 2 and 1, ||x|| of the two queries 2 and 4."""
    hidden = torch.tensor([[[2.0, 0.0], [0.0, -4.0]]])
    got = scores(RULE.replace(normed=True), (1, 3), wo=torch.ones(1, 1), hidden=hidden)
    torch.testing.assert_close(got[1:3], torch.tensor([0.281867, 0.305148]), atol=1e-6, rtol=0)


def test_by_hand_summed() -> None:
    """Columns [.224515, .563734] and [.610296, .207386]: sqrt(their maximum * their sum)."""
    got = scores(RULE.replace(summed=True), (1, 3))
    torch.testing.assert_close(got[1:3], torch.tensor([0.666605, 0.706419]), atol=1e-5, rtol=0)


def test_other_keys_are_away() -> None:
    torch.testing.assert_close(scores(RULE, (4, 6), extra=3)[4:6], scores(RULE, (1, 3))[1:3])


def test_nothing_repeated() -> None:
    assert scores(RULE, (0, 0)).tolist() == [UNHEARD] * 5


def test_one_tile_or_many(monkeypatch) -> None:
    whole = scores(RULE, (1, 3))
    monkeypatch.setattr("kvpass.kernels.rank.replay.TILE", 1)
    assert scores(RULE, (1, 3)).equal(whole)
