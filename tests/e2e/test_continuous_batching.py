"""transformers' continuous batching: its paged cache is written outside of all graphs, so it stays as it is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from models.tiny import llama
from transformers import GenerationConfig
from transformers.generation import configuration_utils

import kvpass
from kvpass.errors import NothingRewritten

PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8]]


SMALL: dict[str, Any] = {"num_blocks": 16, "max_batch_tokens": 64}
"""Else the pages take half of the machine's memory, and as long to fill."""


def generated(model: Any) -> dict[str, list[int]]:
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
    if hasattr(configuration_utils, "ContinuousBatchingConfig"):
        room = {"continuous_batching_config": configuration_utils.ContinuousBatchingConfig(page_size=8, **SMALL)}
    else:
        room = {}
        for name, value in {"block_size": 8, **SMALL}.items():
            setattr(config, name, value)
    results = model.generate_batch(PROMPTS, generation_config=config, progress_bar=False, **room)
    assert not any(result.error for result in results.values()), results
    return {name: result.generated_tokens for name, result in results.items()}


@pytest.mark.skipif(not hasattr(llama(), "generate_batch"), reason="transformers before continuous batching")
def test_tokens_are_the_models_own_and_the_line_is_named() -> None:
    """It also sets the model's configuration, before and in the first call: no state of a conversation."""
    expected = generated(llama(layers=1).eval())
    compiled = kvpass.compile(llama(layers=1).eval(), "h2o", 8, inner="eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert generated(compiled) == expected
    (told,) = [str(one.message) for one in said if issubclass(one.category, NothingRewritten)]
    assert "kvpass rewrites nothing" in told
    assert "Dynamo broke the graph at" in told
    assert ".update(key_states, value_states" in told
