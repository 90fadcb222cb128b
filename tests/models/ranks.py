"""One model in one process and on several ranks: what both say and keep. torchrun runs `main` (support/on_ranks.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from models import tiny, traced
from spelling import cache_of, with_cache

import kvpass
from kvpass.errors import KVPassError
from kvpass.model import compilation

SAMPLE: dict[str, Any] = {
    "h2o": "h2o",  # heads decide alone
    "tova": "tova",  # one ranking for all heads, in every step
    "ada_snapkv": "ada_snapkv",  # heads with budgets of their own
    "layer_defensivekv": "layer_defensivekv",  # over layers, by weights that are shares of all heads
    "compactor": "compactor",  # a scorer over heads, with chance by their numbers
    "nacl": "nacl",  # chance by a head's number
    "d2o": "d2o",  # a bar for all heads
}
"""A policy of each kind, by name."""

MORE: dict[str, Any] = {
    "streaming_llm": "streaming_llm",
    "snapkv_int4": "snapkv_int4",
    "roco": "roco",
    "pyramidkv": "pyramidkv",
    "kvmerger": "kvmerger",
    "elastic_cache": "elastic_cache",
    "chunkkv": "chunkkv",
    "defensivekv": "defensivekv",
    "ada_pyramid": {
        "name": "ada_pyramid",
        "extends": "ada_pyramid",
        "observe": {"queries": 8},
        "protect": {"recent": 8},
    },
    "cake": "cake",
    "simlayerkv": {
        "name": "lazy",
        "extends": "simlayerkv",
        "options": {"recent": 16, "most": 0.35},
        "protect": {"recent": 16},
    },
    "random": "random",
    "keyformer": "keyformer",
    "cam": "cam",
    "every": {"name": "every", "extends": "keydiff", "observe": {"heads": "all"}, "every": 3},
    "calls": {"name": "calls", "extends": "ada_snapkv", "when": "calls"},
}
CASES = SAMPLE | MORE
WHOLE = frozenset({"simlayerkv"})
"""Those that say their budget themselves."""
BUDGET = 44


def made() -> Any:
    return tiny.llama(heads=8, kv_heads=4)


def compiled(model: Any, case: str) -> Any:
    return kvpass.compile(model, CASES[case], None if case in WHOLE else BUDGET, inner="eager")


def first_turn(model: Any) -> Any:
    """What a padded batch of two rows gives: one token of each."""
    return _said(model, *tiny.left_padded([70, 58]), max_new_tokens=1)


def second_turn(model: Any, out: Any, cache: Any) -> Any:
    """Nine tokens more, and nine that the model says."""
    ids, (_, mask) = torch.cat([out.sequences, tiny.tokens(2, 9, seed=5)], 1), tiny.left_padded([70, 58])
    mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=torch.long)], 1)
    return _said(model, ids, mask, max_new_tokens=9, **with_cache(model, cache))


def _said(model: Any, ids: torch.Tensor, mask: torch.Tensor, **asked: Any) -> Any:
    return model.generate(ids, attention_mask=mask, do_sample=False, return_dict_in_generate=True, **asked)


def both_turns(model: Any) -> dict[str, Any]:
    """What it said, positions [B, Hkv, C] of each layer, and what the report says."""
    out = first_turn(model)
    again = second_turn(model, out, cache_of(out))
    cache = cache_of(again)
    kept = [layer.positions for layer in kvpass.inspect(cache).layers]
    report = kvpass.report(cache)
    return {"said": again.sequences, "kept": kept, "text": str(report), **report.to_dict()}


def files(model: Any, folder: str, rank: int) -> dict[str, Any]:
    """A cache that is saved and goes on, and what another rank's file says."""
    out = first_turn(model)
    kvpass.Cache(cache_of(out)).save(f"{folder}/cache{rank}.safetensors")
    torch.distributed.barrier()
    loaded = kvpass.Cache.load(f"{folder}/cache{rank}.safetensors", model).host
    with_other = refusal(lambda: kvpass.Cache.load(f"{folder}/cache{1 - rank}.safetensors", model))
    return {"said": second_turn(model, out, loaded).sequences, "other": with_other}


def refusal(call: Any) -> str:
    """What kvpass says against a call; "" if it does not."""
    try:
        call()
    except KVPassError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder: str, *cases: str) -> None:
    """These cases on one rank: `rank<n>.pt` in the folder."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    compilation.isolated = traced.isolated  # one trace for all policies
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", tp_plan="auto", attn_implementation="sdpa").eval()
    rank = dist.get_rank()
    found: dict[str, Any] = {case: both_turns(compiled(model, case)) for case in cases}
    found["files"] = files(compiled(model, "ada_snapkv"), folder, rank)
    unseen = compilation.Compilation(model, replace(compiled(model, "tova").kvpass, part=None)).root
    found["unseen"] = refusal(lambda: first_turn(unseen))
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
