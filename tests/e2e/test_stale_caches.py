"""A cache belongs to one policy, one budget and one model: given to another it is one StaleCacheError."""

from __future__ import annotations

import copy
import gc
import inspect
from itertools import permutations
from typing import Any

import pytest
import torch
from models import plain, tiny
from models.styles import gpt_fast
from models.styles.style import make
from transformers import LlamaForCausalLM, StaticCache

import kvpass
from kvpass.errors import StaleCacheError
from kvpass.runtime.identity import Identity

NAME = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What this version of transformers calls it."""
POLICIES: list[tuple[str, Any]] = [
    ("h2o", 40),
    ("h2o", 0.5),
    ("full", None),
    ("ada_snapkv", 40),
    ("streaming_llm", 40),
]


def compiled(model: Any, policy: Any = "h2o", budget: Any = 24, **options: Any) -> Any:
    return kvpass.compile(model, policy, budget, inner="eager", **options)


def read(model: Any, cache: Any = None, length: int = 60) -> Any:
    with torch.no_grad():
        return model(plain.tokens(1, length, seed=length), cache)


def refused(model: Any, cache: Any, match: str, length: int = 1) -> None:
    with pytest.raises(StaleCacheError, match=match) as caught:
        read(model, cache, length)
    assert "begin from an empty cache" in caught.value.hint
    assert "blocks.0" in caught.value.where


@pytest.mark.usefixtures("one_trace")
def test_another_policy_or_budget() -> None:
    """Every ordered pair, in a step or in a turn; each cache is still good where it came from."""
    original = plain.make(plain.Decoder)
    models = {key: compiled(original, *key) for key in POLICIES}
    caches = {key: read(model)[1] for key, model in models.items()}
    lengths = {key: (1, 5)[at % 2] for at, key in enumerate(POLICIES)}
    for maker, user in permutations(POLICIES, 2):
        branch = copy.deepcopy(caches[maker])
        refused(models[user], branch, f"made by this model under policy {maker[0]}, budget", lengths[user])
        refused(models[user], caches[maker], f"given to policy {user[0]}, budget", lengths[user])
    for key, model in models.items():
        read(model, caches[key], lengths[key])


def test_equal_compilations_share_a_cache() -> None:
    """Compile the same model twice, or a copy of it: the conversation goes on. The spelling of torch.compile has no
    door at which kvpass could open a cache that `kvpass.compile` closed: it is refused there.
    """
    original = plain.make(plain.Decoder)
    _, cache = read(compiled(original))
    expected, _ = read(compiled(original), copy.deepcopy(cache), 1)
    for model in (compiled(original), compiled(original, strict=False), compiled(copy.deepcopy(original))):
        found, _ = read(model, copy.deepcopy(cache), 1)
        torch.testing.assert_close(found, expected)
    spelled = torch.compile(copy.deepcopy(original), backend=kvpass.backend("h2o", 24, inner="eager"))
    with pytest.raises(kvpass.KVPassError, match="give it to the model that made it"):
        read(spelled, copy.deepcopy(cache), 1)
    found, _ = read(spelled, read(spelled)[1], 1)
    torch.testing.assert_close(found, expected)


def changed(seed: int, names: str = "") -> Any:
    """The same decoder with other weights in parameters of these names."""
    model = plain.make(plain.Decoder)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if names in name:
                parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("names", ["", "blocks.1.v", "head"])
def test_another_model(names: str) -> None:
    """All weights differ, or those of one projection only."""
    _, cache = read(compiled(plain.make(plain.Decoder)))
    other = compiled(changed(3, names))
    for length in (1, 5):
        refused(other, copy.deepcopy(cache), "made by a model with other weights under policy h2o", length)
    _, own = read(other)
    read(other, own, 1)


def test_the_maker_may_be_gone() -> None:
    model = compiled(plain.make(plain.Decoder))
    _, cache = read(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    refused(compiled(changed(3)), copy.deepcopy(cache), "a model with other weights")
    read(compiled(plain.make(plain.Decoder)), cache, 1)


def test_a_model_changes_between_its_turns() -> None:
    """It is still the same model: merged adapters, moved weights."""
    model = plain.make(plain.Decoder)
    own = compiled(model)
    _, cache = read(own)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
        parameter.data += 0.01
    read(own, cache, 1)
    _, merged = read(own)
    refused(compiled(plain.make(plain.Decoder)), merged, "a model with other weights")


def test_static_cache() -> None:
    """Buffers stand for a store that is another policy's or model's, until they are begun anew."""
    model, other = tiny.llama(), tiny.llama()
    torch.nn.init.normal_(other.model.layers[1].mlp.up_proj.weight)
    cache = StaticCache(config=model.config, max_cache_len=80)
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    models = [compiled(model), compiled(model, "tova"), compiled(other)]
    call(models[0], 60, cache)
    for wrong in models[1:]:
        with pytest.raises(StaleCacheError, match="was made by"):
            call(wrong, 1, copy.deepcopy(cache))
    call(models[0], 1, cache)
    cache.reset()
    call(models[1], 60, cache)
    call(models[1], 1, cache)


def call(model: Any, length: int, cache: Any) -> None:
    with torch.no_grad():
        model(tiny.tokens(1, length), use_cache=True, **{NAME: cache})


def test_buffers_of_a_module() -> None:
    """Two compilations of one host, whose buffers are shared between its twins."""
    original = make(gpt_fast.Transformer)
    original.init_cache(1, 80)
    one, two = compiled(original), compiled(original, "tova")
    with torch.no_grad():
        one.step(plain.tokens(1, 50), one, 0)
        with pytest.raises(StaleCacheError, match="under policy h2o"):
            two.step(plain.tokens(1, 1), two, 50)
        one.step(plain.tokens(1, 1), one, 50)


def test_identity_by_objects_then_by_content() -> None:
    """Names that only one call has say nothing; a tensor that cannot be read is nobody's but its own."""
    a, b = torch.nn.Parameter(torch.arange(6.0)), torch.nn.Parameter(torch.arange(6.0))
    other, meta = torch.nn.Parameter(torch.ones(6)), torch.nn.Parameter(torch.empty(6, device="meta"))
    made = Identity({"w": a, "encoder": other})
    assert made.same(Identity({"w": a}))
    assert made.same(Identity({"w": b, "adapter": other}))
    assert not made.same(Identity({"w": other}))
    assert made.same(Identity({"wrapped.w": a}))
    assert not made.same(Identity({"wrapped.w": b}))
    assert not Identity({"w": meta}).same(Identity({"w": torch.nn.Parameter(torch.empty(6, device="meta"))}))
    assert Identity({"w": meta}).same(Identity({"w": meta}))
    assert not made.same(Identity({"w": torch.nn.Parameter(a.detach().half())}))
