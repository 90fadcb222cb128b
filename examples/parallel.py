"""One model on several ranks, each with its own heads of the cache.

python -m torch.distributed.run --nproc-per-node 2 examples/parallel.py HuggingFaceTB/SmolLM2-1.7B-Instruct "Why?"

CPUs talk by gloo, GPUs by NCCL. The ranks divide the KV heads.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from spelling import cache_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvpass


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    asked.add_argument("model", help="a name or a folder")
    asked.add_argument("prompt")
    asked.add_argument("--policy", default="h2o")
    asked.add_argument("--budget", type=float, default=0.2)
    given = asked.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model: Any = AutoModelForCausalLM.from_pretrained(given.model, tp_plan="auto").eval()
    compiled = kvpass.compile(model, given.policy, given.budget, inner="eager")
    inputs = tokenizer(given.prompt, return_tensors="pt").to(model.device)
    torch.manual_seed(0)  # ranks that sample must draw alike
    out = compiled.generate(**inputs, max_new_tokens=40, return_dict_in_generate=True)
    rank = torch.distributed.get_rank()
    if rank == 0:
        print(tokenizer.decode(out.sequences[0], skip_special_tokens=True))
    for turn in range(torch.distributed.get_world_size()):
        torch.distributed.barrier()
        if turn == rank:
            print(kvpass.report(cache_of(out)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
