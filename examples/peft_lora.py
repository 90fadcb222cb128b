"""A LoRA adapter around a compiled model: on, off and scaled after `kvpass.compile`, and the cache evicts in each.

    python -P examples/peft_lora.py

A small random model and a random adapter: what it says is noise. Needs peft (`pip install peft`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import kvpass

sys.path.insert(0, str(Path(__file__).resolve().parent))

from spelling import cache_of
from tiny_llama import load


def adapted(model: Any) -> Any:
    """The model with a random LoRA adapter on its projections of queries and values."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def written(model: Any, ids: torch.Tensor) -> tuple[list[int], dict[str, Any]]:
    """16 greedy tokens after a prompt, and what the cache holds."""
    seen = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    out = model.generate(**seen, max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
    return out.sequences[0, ids.shape[1] :].tolist(), kvpass.report(cache_of(out)).to_dict()


def main() -> None:
    model, tokenizer = load()
    lora = adapted(model)
    compiled = kvpass.compile(lora, policy="snapkv", budget=0.2, inner="eager")
    ids = tokenizer("A prompt of four hundred bytes or so. " * 11, return_tensors="pt").input_ids
    on, held = written(compiled, ids)
    with lora.disable_adapter():  # the adapter belongs to both: what is changed on one is changed on the other
        off, held_off = written(compiled, ids)
    again, _ = written(compiled, ids)
    for name, tokens, told in (("adapter on", on, held), ("adapter off", off, held_off)):
        share = told["bytes"] / told["dense_bytes"]
        print(f"{name}: {share:.1%} of the dense cache, tokens {tokens[:8]} ...")
    print(f"on again: {'the same' if again == on else 'other'} tokens as before")


if __name__ == "__main__":
    main()
