"""examples/peft_lora.py: an adapter switched after compilation is switched in the compiled model, which evicts."""

from __future__ import annotations

import peft_lora
import pytest
import tiny_llama
import torch

import kvpass

PROMPT = "A prompt of four hundred bytes or so. " * 11


def dense(model: torch.nn.Module, ids: torch.Tensor) -> list[int]:
    seen = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model.generate(**seen, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(("policy", "budget"), [("full", 1.0), ("snapkv", 0.2)])
def test_an_adapter_on_and_off(policy: str, budget: float) -> None:
    model, tokenizer = tiny_llama.load()
    lora = peft_lora.adapted(model)
    compiled = kvpass.compile(lora, policy, budget, inner="eager")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    on, told = peft_lora.written(compiled, ids)
    with lora.disable_adapter():
        off, told_off = peft_lora.written(compiled, ids)
        dense_off = dense(lora, ids)
    assert on != off
    for held in (told, told_off):
        assert 0.9 * budget < held["bytes"] / held["dense_bytes"] <= 1.03 * budget
    if policy == "full":
        assert on == dense(lora, ids)
        assert off == dense_off
