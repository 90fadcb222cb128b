"""A compiled model and the one that it was made from are one: what is changed on either is seen by both."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny
from peft import LoraConfig, get_peft_model
from spelling import cache_of
from torch import nn

import kvpass

IDS = tiny.tokens(1, 40)


def full(model: Any) -> Any:
    """Compiled to keep everything: its logits must be the model's own."""
    return kvpass.compile(model, "full", inner="eager")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def same(compiled: Any, model: Any) -> torch.Tensor:
    """Both give the same logits; they are returned."""
    want = logits(model)
    loose = {"rtol": 0.05, "atol": 0.05} if want.dtype is torch.bfloat16 else {}
    torch.testing.assert_close(logits(compiled), want, **loose)
    return want


def lora() -> Any:
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny.llama(layers=1), config)
    model.add_adapter("other", config)
    return model.eval()


def test_adapters_off_merged_switched_and_scaled() -> None:
    """Changed on the PEFT model after compile, and on the compiled one."""
    model = lora()
    compiled = full(model)
    for one in (model, compiled):
        on = same(compiled, model)
        with one.disable_adapter():
            off = same(compiled, model)
        assert not torch.allclose(on, off)
        torch.testing.assert_close(same(compiled, model), on)
        one.merge_adapter()
        torch.testing.assert_close(same(compiled, model), on)
        one.unmerge_adapter()
        one.set_adapter("other")
        assert not torch.allclose(same(compiled, model), on)
        one.set_adapter("default")
        for module in one.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(3.0)
        assert not torch.allclose(same(compiled, model), on)
        for module in one.modules():
            if hasattr(module, "unscale_layer"):
                module.unscale_layer()
        torch.testing.assert_close(same(compiled, model), on)


@pytest.mark.parametrize("inside", [False, True])
def test_generate_of_an_adapted_model_evicts(inside: bool) -> None:
    """PEFT's generate calls the model inside; a compiled model may also be what is adapted."""
    if inside:
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
        model = get_peft_model(kvpass.compile(tiny.llama(layers=1), "h2o", 24, inner="eager"), config)
    else:
        model = kvpass.compile(lora(), "h2o", 24, inner="eager")
    out = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert {site["live_max"] for site in kvpass.report(cache_of(out)).to_dict()["sites"]} == {24}


def assign(model: Any) -> None:
    other = {name: torch.randn_like(tensor) * 0.1 for name, tensor in model.state_dict().items()}
    model.load_state_dict(other, assign=True)


def resize(model: Any) -> None:
    model.resize_token_embeddings(model.config.vocab_size + 7)


def replace_module(model: Any) -> None:
    old = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = nn.Linear(old.in_features, old.out_features)


def replace_parameter(model: Any) -> None:
    head = model.lm_head
    head.weight = nn.Parameter(head.weight.detach() * 2)


def hook(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda module, args, out: out * 2)


def hook_on_a_layer(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 3)


def convert(model: Any) -> None:
    model.to(torch.bfloat16)


CHANGES = [assign, resize, replace_module, replace_parameter, hook, hook_on_a_layer, convert]
SIDES = [
    pytest.param(change, side, marks=[] if at % 2 == side else pytest.mark.wide)
    for at, change in enumerate(CHANGES)
    for side in (False, True)
]
"""Each change on one side: both have the very same modules."""


@pytest.mark.parametrize(("change", "on_compiled"), SIDES)
def test_a_change_is_seen_by_both(change: Callable[[Any], None], on_compiled: bool) -> None:
    model = tiny.llama(layers=1)
    compiled = full(model)
    before = same(compiled, model)
    change(compiled if on_compiled else model)
    after = same(compiled, model)
    assert after.shape != before.shape or after.dtype != before.dtype or not torch.allclose(after, before)


def test_a_hook_that_leaves() -> None:
    model = tiny.llama(layers=1)
    compiled = full(model)
    before, handle = same(compiled, model), model.model.norm.register_forward_hook(lambda *given: given[2] * 2)
    assert not torch.allclose(same(compiled, model), before)
    handle.remove()
    torch.testing.assert_close(same(compiled, model), before)


def test_saving_and_loading(tmp_path: Any) -> None:
    model = tiny.llama(layers=1)
    compiled = full(model)
    same(compiled, model)
    assert compiled.state_dict().keys() == model.state_dict().keys()
    compiled.save_pretrained(tmp_path)
    loaded = type(compiled).from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits(loaded), logits(model))
    file = io.BytesIO()
    torch.save(compiled, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert again.kvpass.policy == compiled.kvpass.policy
    same(again, model)
