"""One model in one process and on several ranks: what both say and keep. torchrun runs `main` (support/on_ranks.py)."""

from __future__ import annotations

from typing import Any

import torch
from models import tiny, traced
from spelling import cache_of, with_cache

import kvpass
from kvpass.model import compilation

CASES: dict[str, Any] = {
    "h2o": "h2o",
    "streaming_llm": "streaming_llm",
    "roco": "roco",
    "tova": "tova",  # one ranking for all heads, in every step
    "elastic_cache": "elastic_cache",
    "ada_snapkv": "ada_snapkv",  # heads with budgets of their own
    "defensivekv": "defensivekv",  # and weights that are shares of all heads
    "layer_defensivekv": "layer_defensivekv",  # over layers
    "cake": "cake",  # layers by what all their heads prefer
    "simlayerkv": {"name": "lazy", "extends": "simlayerkv", "options": {"recent": 16}, "protect": {"recent": 16}},
    "compactor": "compactor",  # z-scores over heads
    "nacl": "nacl",  # chance by a head's number
    "random": "random",
    "d2o": "d2o",  # a bar for all heads
    "cam": "cam",
    "pyramidkv": "pyramidkv",
    "snapkv_int4": "snapkv_int4",
}
"""A policy of each kind, by name."""
WHOLE = frozenset({"simlayerkv"})
"""Those that say their budget themselves."""
BUDGET = 44


def made() -> Any:
    return tiny.llama(heads=8, kv_heads=4)


def compiled(model: Any, case: str) -> Any:
    return kvpass.compile(model, CASES[case], None if case in WHOLE else BUDGET, inner="eager")


def first_turn(model: Any) -> Any:
    """What a padded batch of two rows gives."""
    ids, mask = tiny.left_padded([70, 58])
    return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)


def second_turn(model: Any, out: Any) -> Any:
    ids = torch.cat([out.sequences, tiny.tokens(2, 9, seed=5)], 1)
    _, mask = tiny.left_padded([70, 58])
    mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=torch.long)], 1)
    more = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(ids, **more, **with_cache(model, cache_of(out)))


def said(model: Any, between: Any = lambda out: None) -> dict[str, Any]:
    """Tokens of two turns, positions [B, Hkv, C] of each layer, and what the report counts."""
    out = first_turn(model)
    other = between(out)
    again = second_turn(model, out)
    cache = cache_of(again)
    report = kvpass.report(cache).to_dict()
    kept = [layer.positions for layer in kvpass.inspect(cache).layers]
    numbers = {key: report[key] for key in ("bytes", "slot_bytes", "overhead_bytes", "dense_bytes", "proof", "part")}
    return {"tokens": again.sequences, "kept": kept, "between": other, **numbers}


def main(folder: str, *cases: str) -> None:
    """Everything on one rank, or some cases: `rank<n>.pt` in the folder."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    compilation.isolated = traced.isolated  # one trace for all policies
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", tp_plan="auto", attn_implementation="sdpa").eval()
    rank, found = dist.get_rank(), {}
    for case in cases or CASES:
        found[case] = said(compiled(model, case))
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
