"""Searches that transformers moved to its hub, by hand: contrastive search, which tries several tokens in rows of a
repeated cache and picks one of them, or one after the other and takes them back; and beams in groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny
from models.kinds import KINDS
from oracle.drive import compare_logits, kept_positions
from oracle.judge import judge_of
from spelling import with_cache
from torch import Tensor
from transformers import DynamicCache

import kvpass

Found = tuple[Tensor, Tensor, Any]
"""Tokens int [B, T], the last logits [B, vocabulary], the cache."""
TRIED, ALPHA = 3, 0.6


class Loop:
    """A model, its cache, and how the last token's logits and hidden states are had."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config)

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        given = {**with_cache(self.model, self.cache), "use_cache": True, "output_hidden_states": True}
        out = self.model(input_ids=ids, **given)
        return out.logits[:, -1], out.hidden_states[-1]


def best(probs: Tensor, hidden: Tensor, history: Tensor) -> Tensor:
    """Of the candidates of each row [B, n] the likeliest that is not like what was before it."""
    likeness = torch.cosine_similarity(history[:, None], hidden[:, :, None], dim=-1).amax(-1)
    return ((1 - ALPHA) * probs - ALPHA * likeness).argmax(-1)


@torch.no_grad()
def contrastive(model: Any, ids: Tensor, new: int = 5) -> Found:
    """All candidates at once."""
    loop, rows = Loop(model), len(ids)
    logits, history = loop(ids)
    for _ in range(new):
        probs, tokens = logits.softmax(-1).topk(TRIED)
        loop.cache.batch_repeat_interleave(TRIED)
        tried, hidden = loop(tokens.view(-1, 1))
        picked = best(probs, hidden.view(rows, TRIED, -1), history)
        at = picked + torch.arange(rows) * TRIED
        loop.cache.batch_select_indices(at)
        ids = torch.cat([ids, tokens.gather(1, picked[:, None])], 1)
        logits, history = tried[at], torch.cat([history, hidden[at]], 1)
    return ids, logits, loop.cache


@torch.no_grad()
def contrastive_in_turn(model: Any, ids: Tensor, new: int = 5) -> Found:
    """One candidate after the other, each taken back: the best is fed once more."""
    loop = Loop(model)
    logits, history = loop(ids)
    for _ in range(new):
        probs, tokens = logits.softmax(-1).topk(TRIED)
        states = []
        with kvpass.tentative():
            for candidate in tokens.split(1, 1):
                states.append(loop(candidate)[1])
                loop.cache.crop(-1)
        picked = best(probs, torch.cat(states, 1), history)
        token = tokens.gather(1, picked[:, None])
        logits, hidden = loop(token)
        ids, history = torch.cat([ids, token], 1), torch.cat([history, hidden], 1)
    return ids, logits, loop.cache


@torch.no_grad()
def beams_in_groups(model: Any, ids: Tensor, new: int = 5, groups: int = 2, each: int = 2) -> Found:
    """Of one prompt: a group is told which tokens those before it took, and takes others."""
    loop, scores = Loop(model), torch.tensor([[0.0] + [-1e9] * (each - 1)] * groups)
    ids = ids.repeat(groups * each, 1)
    logits, _ = loop(ids)
    for _ in range(new):
        taken, order, tokens = torch.zeros(logits.shape[1]), [], []
        for group in range(groups):
            mine = logits.log_softmax(-1)[group * each : (group + 1) * each]
            total = scores[group][:, None] + mine - 2.0 * taken
            scores[group], flat = total.flatten().topk(each)
            order.append(flat // logits.shape[1] + group * each)
            tokens.append(flat % logits.shape[1])
            taken += torch.bincount(tokens[-1], minlength=len(taken))
        rows, chosen = torch.cat(order), torch.cat(tokens)[:, None]
        loop.cache.reorder_cache(rows)
        ids = torch.cat([ids[rows], chosen], 1)
        logits, _ = loop(chosen)
    return ids, logits, loop.cache


SEARCHES: dict[str, tuple[Callable[..., Found], int]] = {
    "contrastive": (contrastive, 2),
    "in groups": (beams_in_groups, 1),
}
"""And how many prompts they take."""


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("policy", ["full", "h2o", "ada_snapkv"])
def test_as_on_the_model_that_sees_what_is_kept(search: str, policy: str) -> None:
    model, budget = tiny.one_llama(layers=1), 1.0 if policy == "full" else 40
    found, rows = SEARCHES[search]
    compiled = kvpass.compile(model, policy, None if policy == "full" else budget, inner="eager")
    judge = judge_of(model, policy, budget)
    ids, logits, cache = found(compiled, tiny.tokens(rows, 80))
    with judge.following():
        want, there, theirs = found(judge.model, tiny.tokens(rows, 80))
    assert torch.equal(ids, want)
    compare_logits(logits, there)
    for layer, positions in enumerate(kept_positions(cache)):
        kept = [[head.tolist() for head in row] for row in judge.of(theirs).kept(layer)]
        assert kept == [[sorted(at for at in head if at >= 0) for head in row] for row in positions.tolist()]


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.wide) if kind in ("a share", "layers") else kind for kind in KINDS]
)
def test_one_after_the_other_is_all_at_once(kind: str) -> None:
    model = tiny.one_llama(layers=2 if kind == "layers" else 1)
    compiled = kvpass.compile(model, *KINDS[kind], inner="eager")
    (one, first, kept), (other, second, there) = (
        found(compiled, tiny.tokens(2, 80)) for found in (contrastive, contrastive_in_turn)
    )
    assert torch.equal(one, other)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    assert all(map(torch.equal, kept_positions(kept), kept_positions(there)))


@pytest.mark.usefixtures("one_trace")
@torch.no_grad()
def test_a_token_that_cannot_be_taken_back() -> None:
    """Who tries candidates one after the other has to say that they are tentative."""
    loop = Loop(kvpass.compile(tiny.one_llama(layers=1), "h2o", 40, inner="eager"))
    loop(tiny.tokens(2, 80))
    loop(tiny.tokens(2, 1))
    loop.cache.crop(-1)
    with pytest.raises(kvpass.KVPassError, match=r"kvpass\.tentative"):
        loop(tiny.tokens(2, 1))
