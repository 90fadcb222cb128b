"""Conversations: generate upon generate, prompts in chunks, and the three ways to call, all against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from oracle.drive import Conversation, kept_positions
from oracle.hf import Oracle
from oracle.policies import EVICTING
from spelling import cache_of, with_cache
from transformers import DynamicCache

import kvpass

GREEDY: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}


def turn(model: Any, ids: torch.Tensor, new: int, cache: Any = None) -> Any:
    past = {} if cache is None else with_cache(model, cache)
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **past, **GREEDY)


@pytest.mark.parametrize("policy", EVICTING)
@pytest.mark.usefixtures("one_trace")
def test_generate_twice(policy: str) -> None:
    """The second turn feeds the last token of the first, then new ones, at once: an extend call on compressed slots."""
    model = tiny.one_llama(6, 2)
    compiled, oracle = kvpass.compile(model, policy, 48, inner="eager"), Oracle(model, policy, 48)
    prompt, more = tiny.tokens(1, 80), tiny.tokens(1, 17, seed=4)
    first = turn(compiled, prompt, 12)
    expected = oracle.generate(prompt, 12)
    assert torch.equal(first.sequences[:, 80:], expected)
    oracle.simulator.follow(kept_positions(cache_of(first)))
    second = turn(compiled, torch.cat([first.sequences, more], dim=1), 12, cache_of(first))
    answer = oracle.generate(torch.cat([expected[:, -1:], more], dim=1), 12)
    assert torch.equal(second.sequences[:, 80 + 12 + 17 :], answer)
    oracle.simulator.follow(kept_positions(cache_of(second)))
    assert oracle.simulator.near_ties == 0


@pytest.mark.parametrize("policy", EVICTING)
@pytest.mark.usefixtures("one_trace")
def test_prompt_in_chunks(policy: str) -> None:
    """Each chunk sees what the chunks before left, and evicts in its turn."""
    conversation = Conversation(tiny.one_llama(6, 2), policy, 48, inner="eager")
    for chunk in tiny.tokens(2, 170).split(40, dim=1):
        token = conversation.call(chunk)
    conversation.decode(token, 5)


def loop(model: Any, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """A hand-written greedy loop."""
    cache, chosen = DynamicCache(config=model.config), []
    for _ in range(steps):
        with torch.no_grad():
            ids = model(ids, **with_cache(model, cache), logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        chosen.append(ids)
    return torch.cat(chosen, dim=1)


def test_torch_compile_by_name() -> None:
    model, prompt = tiny.llama(6, 2), tiny.tokens(1, 100)
    by_generate = turn(kvpass.compile(model, "h2o", 0.5, inner="eager"), prompt, 20).sequences[:, 100:]
    options = {"policy": "h2o", "budget": 0.5, "inner": "eager"}
    by_name = loop(torch.compile(model, backend="kvpass", options=options), prompt, 20)
    assert torch.equal(by_name, by_generate)
    assert torch.equal(Oracle(model, "h2o", 0.5).generate(prompt, 20), by_generate)


def test_torch_compile_by_function() -> None:
    model, prompt = tiny.llama(6, 2), tiny.tokens(1, 100)
    compiled = torch.compile(model, backend=kvpass.backend("h2o", 0.5, inner="eager"))
    assert torch.equal(loop(compiled, prompt, 20), Oracle(model, "h2o", 0.5).generate(prompt, 20))


def test_two_conversations_do_not_mix() -> None:
    """One compiled model, two caches, calls interleaved; a third conversation starts where the first is not
    finished."""
    model = tiny.llama(6, 2)
    compiled = kvpass.compile(model, "roco", 48, inner="eager")
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    oracles = [Oracle(model, "roco", 48) for _ in range(2)]
    ids = [tiny.tokens(1, 90, seed=1), tiny.tokens(1, 70, seed=2)]
    for _ in range(6):
        for i in range(2):
            with torch.no_grad():
                logits = compiled(ids[i], **with_cache(compiled, caches[i]), logits_to_keep=1).logits[:, -1]
            assert torch.equal(logits.argmax(-1), oracles[i](ids[i]).argmax(-1))
            oracles[i].simulator.follow(kept_positions(caches[i]))
            ids[i] = logits.argmax(-1, keepdim=True)
