"""Positions inside the cache, row by row: padding and unequal turns change nothing; what cannot be known is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from oracle.drive import Conversation
from spelling import cache_of, with_cache

import kvpass
from kvpass.errors import CacheError, PolicyError

STEPS = tiny.tokens(1, 6, seed=8)


def chat(model: Any, ids: torch.Tensor, mask: torch.Tensor, turns: list[int], fill: int) -> tuple[torch.Tensor, Any]:
    """Turns of so many columns, each followed by three steps: the steps' logits, and the cache. Padding is at position
    `fill`, columns and cache as `generate` hands them on.
    """
    cache, seen, logits = None, mask[:, :0], []
    for turn, columns in enumerate(turns):
        start = sum(turns[:turn])
        calls = [(ids[:, start : start + columns], mask[:, start : start + columns])]
        calls += [(STEPS[:, [3 * turn + i]].expand(len(ids), 1), mask.new_ones(len(ids), 1)) for i in range(3)]
        for tokens, new in calls:
            seen = torch.cat([seen, new], 1)
            positions = (seen.cumsum(-1) - 1).masked_fill(seen == 0, fill)[:, -tokens.shape[1] :]
            past = {} if cache is None else with_cache(model, cache)
            with torch.no_grad():
                out = model(input_ids=tokens, attention_mask=seen, position_ids=positions, use_cache=True, **past)
            cache = cache_of(out)
            logits += [out.logits[:, -1]] if tokens.shape[1] == 1 else []
    return torch.stack(logits, 1), cache


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", ["streaming_llm_reindexed", "cascading", "finch"])
@pytest.mark.some(1)
def test_rows_are_what_they_are_alone(policy: str) -> None:
    """Prompts of 100 and 60 tokens, second turns of 20 and 3, padding at position 0 and at 1."""
    model = kvpass.compile(tiny.one_llama(4, 2, layers=1), policy, 40, inner="eager")
    lengths = [[100, 20], [60, 3]]
    ids = tiny.tokens(2, 120)
    mask = torch.stack(
        [torch.cat([torch.arange(100) >= 100 - a, torch.arange(20) >= 20 - b]).long() for a, b in lengths]
    )
    alone = [
        chat(model, ids[[r], :][mask[[r]] == 1][None], mask.new_ones(1, sum(n)), n, 0)[0] for r, n in enumerate(lengths)
    ]
    for fill in (0, 1):
        found, _ = chat(model, ids * mask, mask, [100, 20], fill)
        torch.testing.assert_close(found, torch.cat(alone), atol=1e-4, rtol=0)


@pytest.mark.usefixtures("one_trace")
def test_a_first_call_of_one_token() -> None:
    """Streamed from the first token on, against keys that are turned in float64."""
    conversation = Conversation(tiny.one_llama(4, 2, layers=1), "streaming_llm_reindexed", 24, inner="eager")
    for token in tiny.tokens(1, 40).split(1, 1):
        conversation.call(token)


@pytest.mark.usefixtures("one_trace")
def test_positions_that_do_not_rise_by_one_are_refused_at_their_call() -> None:
    model = kvpass.compile(tiny.one_llama(4, 2, layers=1), "streaming_llm_reindexed", 24, inner="eager")
    ids, gap = tiny.tokens(2, 30), torch.arange(30).repeat(2, 1)
    gap[1, 20:] += 5
    with torch.no_grad(), pytest.raises(CacheError, match="positions of row 1 do not rise by one") as told:
        model(input_ids=ids, position_ids=gap, use_cache=True)
    assert "attention_mask" in str(told.value)


LONG = {"factor": 4.0, "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def test_frequencies_that_change_with_the_length_are_refused() -> None:
    """longrope before anything is compiled; dynamic NTK, which is found out by its angles, when they change."""
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64, **LONG}
    model = kvpass.compile(
        tiny.llama(4, 2, layers=1, rope_parameters=rope), "streaming_llm_reindexed", 24, inner="eager"
    )
    with torch.no_grad(), pytest.raises(PolicyError, match="changes its rotary frequencies with the length"):
        model(input_ids=tiny.tokens(1, 40), use_cache=True)


def test_dynamic_frequencies_are_refused_when_they_change() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    hf = tiny.llama(4, 2, layers=1, rope_parameters=rope)
    hf.model.rotary_emb.max_seq_len_cached = hf.model.rotary_emb.original_max_seq_len = 48
    hf.config.max_position_embeddings = 48
    model = kvpass.compile(hf, "streaming_llm_reindexed", 24, inner="eager")
    with torch.no_grad():
        cache = cache_of(model(input_ids=tiny.tokens(1, 40), use_cache=True))
        with pytest.raises(CacheError, match="changes its rotary frequencies with the length"):
            model(input_ids=tiny.tokens(1, 40, seed=1), use_cache=True, **with_cache(model, cache))
