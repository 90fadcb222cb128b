"""docs/generate.md, row by row: what its table says of a request is what happens (models/requests.py says how it is
seen).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import tiny, zoo
from models.habits import Counting, Halved, Looking, cast, checkpointing, own_layers
from models.page_tables import table
from models.requests import IDS, SMALL, Asked, Case, Models, as_theirs, declined, generated, refused, shown, works
from spelling import cache_of, with_cache
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation import configuration_utils

import kvpass
from kvpass import errors

PAGE = table("generate.md", "asked")


@pytest.fixture(autouse=True)
def deprecated_names() -> Iterator[None]:
    """Some names of caches are deprecated, which is transformers' business here."""
    yield
    for handler in logging.getLogger("transformers").handlers:
        getattr(handler, "said", []).clear()  # of conftest.py


def configured(**fields: Any) -> dict[str, Any]:
    """By a generation config."""
    return {"generation_config": GenerationConfig(**fields)}


def with_a(make: Callable[[Any], Any]) -> Asked:
    return lambda model: with_cache(model, make(model.config))


def prefilled(**more: Any) -> Asked:
    """A cache of one row's first 70 tokens, repeated for three."""

    def asked(model: Any) -> dict[str, Any]:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(IDS[:1, :70], **with_cache(model, cache), use_cache=True)
        cache.batch_repeat_interleave(3)
        return {**with_cache(model, cache), **more}

    return asked


def turn(**wrong: Callable[[Tensor], Tensor]) -> Asked:
    """A second turn: six tokens were said, four come. `wrong`: what is done to the tokens and the mask."""

    def asked(model: Any) -> dict[str, Any]:
        out = generated(model, {})
        said = torch.cat([out.sequences, tiny.tokens(2, 4, seed=5)], 1)
        given = {"inputs": said, "attention_mask": torch.ones_like(said)}
        return {
            **{name: wrong.get(name, _same)(value) for name, value in given.items()},
            **with_cache(model, cache_of(out)),
        }

    return asked


def _same(given: Tensor) -> Tensor:
    return given


def edited(ids: Tensor) -> Tensor:
    other = ids.clone()
    other[1, 33] = 96 - other[1, 33]
    return other


def training(_: Models) -> None:
    model = tiny.llama(layers=1)
    compiled = kvpass.compile(model, *SMALL, inner="eager")
    model.train()
    for each in (False, True):
        if each:
            model.gradient_checkpointing_enable()
        with pytest.raises(errors.TrainingError, match="train mode"):
            generated(compiled, {})
    assert not compiled.kvpass.graphs


def under_autocast(_: Models) -> None:
    compiled = kvpass.compile(tiny.llama(layers=1), *SMALL, inner="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(errors.DeclinedError, match="AUTOCAST"):
        generated(compiled, {})


NAMES = (*configuration_utils.ALL_CACHE_IMPLEMENTATIONS, "paged")


def named(*names: str) -> list[Asked]:
    """Those of which the installed transformers knows."""
    return [{"cache_implementation": name} for name in names if name in NAMES]


BEAMS = {"num_beams": 3}
SAMPLES = {"do_sample": True, "temperature": 1.5}
MANY = {"inputs": IDS[:1].repeat(3, 1)}
DECODED = {"max_new_tokens": 40, "attention_mask": None}
OUTPUTS = ("output_hidden_states", "output_scores", "output_logits")

CASES: dict[str, Case] = {
    "greedy": works({}, configured(max_new_tokens=6, return_dict_in_generate=True)),
    "sampling": works(SAMPLES),
    "`num_return_sequences`": works({**SAMPLES, "num_return_sequences": 3}),
    "`num_beams`, also sampled, with `num_return_sequences`": works(
        BEAMS, {**BEAMS, **SAMPLES, "num_return_sequences": 2}
    ),
    "`guidance_scale`, `negative_prompt_ids`": works(
        {"guidance_scale": 1.7, "negative_prompt_ids": tiny.tokens(2, 80)}
    ),
    "`prefill_chunk_size`": works({"prefill_chunk_size": 30}),
    "contrastive search, group beams": shown(
        "works, by hand", "e2e/test_searches_by_hand.py::test_as_on_the_model_that_sees_what_is_kept"
    ),
    "`assistant_model`, `prompt_lookup_num_tokens`, `assistant_early_exit`, being an assistant": shown(
        "works",
        "e2e/test_speculative.py::test_prompt_lookup_is_plain_decoding",
        "e2e/test_judge.py::test_smollm2_at_a_quarter",
    ),
    "`use_mtp` under a policy that evicts": refused("use_mtp", {"use_mtp": True}, also=False),
    "`dola_layers`": refused("DoLa", {"dola_layers": "low"}),
    "`output_hidden_states`, `output_scores`, `output_logits`": works(dict.fromkeys(OUTPUTS, True)),
    "`output_attentions`": refused(
        "output_attentions=True", {"output_attentions": True}, configured(output_attentions=True)
    ),
    "`streamer`, also read from a worker thread": shown(
        "works", "e2e/test_surroundings.py::test_streams_from_a_worker_thread"
    ),
    "`logits_processor`, `stopping_criteria`, `custom_generate` that calls the model": works(
        {"logits_processor": [lambda ids, scores: -scores]}, {"stopping_criteria": [lambda ids, scores: ids[:, 0] < 0]}
    ),
    '`cache_implementation` left out, or `"dynamic"`': works(*named("dynamic")),
    '`cache_implementation`: `"static"`, `"sliding_window"`, `"hybrid"`, `"hybrid_chunked"`': works(
        *named("static", "sliding_window", "hybrid", "hybrid_chunked")
    ),
    '`cache_implementation`: `"offloaded"`, `"offloaded_static"`': refused(
        "cache_implementation='offloaded",
        *named("offloaded", "offloaded_static"),
        configured(cache_implementation="offloaded"),
    ),
    '`cache_implementation`: `"offloaded_hybrid"`, `"offloaded_hybrid_chunked"`': refused(
        "cache_implementation='offloaded", *named("offloaded_hybrid", "offloaded_hybrid_chunked")
    ),
    '`cache_implementation`: `"quantized"`, `"paged"`': refused("cache_implementation='", *named("quantized", "paged")),
    "a cache with `offloading`, also inside of an `EncoderDecoderCache`": refused(
        "with offloading",
        with_a(lambda config: DynamicCache(config=config, offloading=True)),
        with_a(lambda config: EncoderDecoderCache(DynamicCache(config=config, offloading=True), DynamicCache())),
    ),
    "a `StaticCache` of your own": works(with_a(lambda config: StaticCache(config=config, max_cache_len=100))),
    "a subclass of `DynamicCache`, or of its layers, that calls what it overrides": works(
        with_a(lambda config: Counting(config=config)), with_a(own_layers)
    ),
    "one whose `update` reads the keys": declined("KEY_ESCAPES", with_a(lambda config: Looking(config=config))),
    "one whose `update` gives keys and values of different dtypes": declined(
        "DTYPE", with_a(lambda config: Halved(config=config))
    ),
    "a cache of one row, repeated for many": works(prefilled(**MANY)),
    "a cache of one row, repeated for `num_beams`": works(prefilled(inputs=IDS[:1], **BEAMS)),
    "a cache of an earlier turn, and the whole conversation": works(turn()),
    "the same, and new tokens alone with a mask for all": works(turn(inputs=lambda ids: ids[:, 85:])),
    "the same, and a history that is shorter, or new tokens with a mask for them alone": refused(
        "but its cache holds 85",
        turn(inputs=lambda ids: ids[:, :60], attention_mask=lambda mask: mask[:, :60]),
        turn(inputs=lambda ids: ids[:, 86:], attention_mask=lambda mask: mask[:, 86:]),
        error=errors.StaleCacheError,
    ),
    "the same, and an edited history": refused("token 33 of row 1", turn(inputs=edited), error=errors.StaleCacheError),
    "the same, and a mask that is too short": refused(
        "mask for 89", turn(attention_mask=lambda mask: mask[:, 1:]), error=errors.StaleCacheError
    ),
    "`inputs_embeds`, also in later turns": shown(
        "works", "e2e/test_surroundings.py::test_embeddings_in_the_first_and_in_later_turns"
    ),
    "pictures (LLaVA, Qwen2-VL)": shown("works", "e2e/test_multimodal.py::test_pictures_and_words"),
    "an encoder and a decoder": works(DECODED, of=zoo.bart),
    "layers with windows": works(of=zoo.gemma3),
    "bfloat16, float16": shown("works", "e2e/test_numerics.py::test_half_precision"),
    "autocast around the call": Case("refused: `DeclinedError`", under_autocast),
    "autocast around attention": declined("AUTOCAST", of=cast("self_attn")),
    "autocast around another part": works(of=cast("mlp")),
    "keys and values of different dtypes in an attention": as_theirs(of=cast("self_attn.v_proj", automatic=False)),
    "train mode, with or without gradient checkpointing": Case("refused: `TrainingError`", training),
    "gradient checkpointing in eval mode": works(of=checkpointing),
    "an empty prompt": shown(
        "transformers' own error", "e2e/test_numerics.py::test_an_empty_prompt_is_the_models_own_error"
    ),
    "a mask of another length": as_theirs({"attention_mask": torch.ones(2, 79)}),
}


ALSO = (
    "`num_return_sequences`",
    "`num_beams`, also sampled, with `num_return_sequences`",
    "`guidance_scale`, `negative_prompt_ids`",
    "`prefill_chunk_size`",
    "`output_hidden_states`, `output_scores`, `output_logits`",
    '`cache_implementation`: `"static"`, `"sliding_window"`, `"hybrid"`, `"hybrid_chunked"`',
    "an encoder and a decoder",
    "layers with windows",
    "autocast around the call",
    "autocast around another part",
    "gradient checkpointing in eval mode",
)
"""Rows that need traces of their own; test_beams.py, test_surroundings.py and test_autocast.py show the like."""


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("asked", [pytest.param(row, marks=pytest.mark.wide) if row in ALSO else row for row in CASES])
def test_a_row(asked: str) -> None:
    CASES[asked].check(Models.of(tiny.one_llama(layers=1)))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"output_attentions": True}, "output_attentions=True"),
        ({"prompt_lookup_num_tokens": 4, "cache_implementation": "static"}, "prompt lookup over a preallocated cache"),
    ],
    ids=str,
)
def test_settings_that_are_given_by_place(fields: dict[str, Any], told: str) -> None:
    compiled = kvpass.compile(tiny.llama(layers=1), *SMALL, inner="eager")
    with pytest.raises(errors.CacheError, match=told):
        compiled.generate(IDS[:1], GenerationConfig(**fields))


def test_the_page_says_so() -> None:
    """Each row is a case, each case a row; and each name of a cache that transformers knows is in one."""
    assert {row: cells[0] for row, cells in PAGE.items()} == {row: case.happens for row, case in CASES.items()}
    told = {name for row in PAGE if "cache_implementation" in row for name in re.findall(r'`"(\w+)"`', row)}
    assert set(NAMES) <= told
