"""What a rule for a replay's scores would keep, tried by masks on the unmodified model: one replay for all rules.

    python -P examples/quality/masks.py [--trials 6] [--context 1024] [--budget 0.1] [--seed 0]

Nothing of kvpass is used: its own answers are replay.py's. The question and the answer stay whole. Writes
examples/quality/results/masks/<date>-<machine>.json, which replay.py's page shows.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import smollm2
import torch
from bench import machine
from spelling import with_cache
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import logging as transformers_logging

from quality.prompts import Prompts
from quality.tasks.needles import TASKS
from quality.tasks.trial import Trial

SINKS, TAIL, QUESTION = 4, 16, 24
"""Tokens that stay: the first, and the last where a rule says so; and tokens of a question."""

RULES: dict[str, Callable[[dict[str, Tensor], float], Tensor]] = {
    "largest": lambda s, n: flat(s["largest"], n),
    "largest, question in the budget": lambda s, n: flat(s["largest"], n - QUESTION),
    "largest, last 16": lambda s, n: flat(s["largest"], n, TAIL),
    "largest * norms": lambda s, n: flat(s["normed"], n),
    "sum, last 16": lambda s, n: flat(s["summed"], n, TAIL),
    "sqrt(largest * sum)": lambda s, n: flat(s["largest"] * s["summed"], n),
    "sqrt(largest * sum), last 16": lambda s, n: flat(s["largest"] * s["summed"], n, TAIL),
    "largest, layers alike": lambda s, n: torch.cat([flat(one[None], n) for one in s["largest"]]),
    "largest, heads alike": lambda s, n: torch.stack(
        [torch.cat([flat(head[None, None], n)[0] for head in layer]) for layer in s["largest"]]
    ),
}
"""By name: scores [layers, Hkv, T] by kind, and slots of a head on average -> what stays."""


def flat(score: Tensor, slots: float, tail: int = 0) -> Tensor:
    """The best slots of all layers and heads: bool, of the shape of score [layers, Hkv, T]."""
    score = score.clone()
    score[..., :SINKS] = score[..., score.shape[-1] - tail :] = math.inf
    best = score.flatten().topk(int(slots * score.shape[0] * score.shape[1])).indices
    return torch.zeros(score.numel(), dtype=torch.bool).scatter_(0, best, True).view_as(score)


class Masked:
    """The model, with what stays of the first tokens, and with ears: scores of a call that repeats them."""

    def __init__(self) -> None:
        self.model, tokenizer = smollm2.load()
        self.tokenizer = tokenizer
        self.kept: Tensor | None = None
        self.heard: dict[str, Tensor] | None = None
        self.inputs: dict[int, Tensor] = {}
        AttentionInterface.register("masked", self.attend)
        AttentionMaskInterface.register("masked", sdpa_mask)
        self.model.set_attn_implementation("masked")
        for block in self.model.model.layers:
            block.self_attn.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: Any, args: Any, kwargs: Any) -> None:
        self.inputs[module.layer_idx] = (args[0] if args else kwargs["hidden_states"])[0]

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        q = q[0].unflatten(0, (k.shape[1], -1))  # [Hkv, G, S, D]
        k, v, new, length = k[0], v[0], q.shape[2], k.shape[2]
        sees = torch.ones(new, length, dtype=torch.bool).tril(length - new).expand(len(k), -1, -1)
        if self.heard is not None:
            self.listen(module, q, k, v, sees[0], scaling)
        if self.kept is not None:
            stays = self.kept[module.layer_idx]
            sees = sees.clone()
            sees[..., : stays.shape[-1]] &= stays[:, None]
        wide = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
        out = scaled_dot_product_attention(q, *wide, attn_mask=sees[:, None], scale=scaling)
        return out.flatten(0, 1)[None].transpose(1, 2).contiguous(), None

    def listen(self, module: Any, q: Tensor, k: Tensor, v: Tensor, sees: Tensor, scale: float) -> None:
        """Scores of the first half of the keys, of which the call is a repetition: of KVzip's softmax, which is over
        all of them where one call repeats everything.
        """
        assert self.heard is not None
        half = q.shape[2]
        probs = (q @ k[:, None].mT * scale).masked_fill(~sees, -math.inf).softmax(-1)[..., :half]
        outward = module.o_proj.weight.unflatten(1, (len(k), q.shape[1], -1))
        norms = torch.einsum("htd,ohgd->hgto", v[:, :half], outward).norm(dim=-1)
        inputs = self.inputs[module.layer_idx].norm(dim=-1)
        layer = module.layer_idx
        self.heard["largest"][layer] = probs.amax((1, 2))
        self.heard["summed"][layer] = probs.sum(2).amax(1)
        self.heard["normed"][layer] = (probs * norms[:, :, None] / inputs[:, None]).amax((1, 2))

    def run(self, ids: list[int], cache: Any, logits: int = 1) -> Tensor:
        out = self.model(torch.tensor([ids]), **with_cache(self.model, cache), use_cache=True, logits_to_keep=logits)
        return out.logits[0].float().log_softmax(-1)

    def scores(self, ids: list[int], cache: Any) -> dict[str, Tensor]:
        """Of a prompt: [layers, Hkv, T] by kind; the cache stays as it was."""
        config = self.model.config
        sizes = config.num_hidden_layers, config.num_key_value_heads, len(ids)
        self.heard = found = {kind: torch.zeros(sizes) for kind in ("largest", "summed", "normed")}
        self.run(ids, cache)
        self.heard = None
        cache.crop(-len(ids))
        return found

    def answer(self, prompts: Prompts, trial: Trial, cache: Any, kept: Tensor | None, task: str) -> dict[str, Any]:
        gold, self.kept = trial.questions[task].gold, kept
        said = [*prompts.follow_up(trial, "agnostic", task), *gold[:-1]]
        logp = self.run(said, cache, len(gold))
        self.kept = None
        cache.crop(-len(said))
        right = logp.argmax(-1) == torch.tensor(gold)
        nll = -logp.gather(-1, torch.tensor(gold)[:, None]).mean()
        return {"right": bool(right.all()), "digits": int(right.sum()), "nll": float(nll)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    masked = Masked()
    prompts = Prompts(masked.tokenizer, args.seed)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("full", *RULES)}
    for index in range(args.trials):
        trial, cache = prompts.trial(args.context, index), DynamicCache(config=masked.model.config)
        ids = prompts.prompt(trial, args.context, "agnostic", None)
        masked.run(ids, cache)
        scores = masked.scores(ids, cache)
        for name, found in rows.items():
            kept = None if name == "full" else RULES[name](scores, args.budget * len(ids))
            found += [masked.answer(prompts, trial, cache, kept, task) for task in TASKS]
            right, nll = sum(one["right"] for one in found), sum(one["nll"] for one in found) / len(found)
            print(f"{index}: {name}: {right}/{len(found)}, NLL {nll:.3f}", flush=True)
        facts = machine.describe()
        command = shlex.join(["python", "-P", "examples/quality/masks.py", *sys.argv[1:]])
        whole = {"date": date.today().isoformat(), "command": command, "machine": facts, "budget": args.budget}
        path = Path(__file__).parent / "results" / "masks" / f"{whole['date']}-{machine.slug(facts)}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**whole, "rules": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
