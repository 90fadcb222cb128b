"""What one prefill tells of heads and keys, tried by masks on the unmodified model: docs/design/0022-heads-by-reach.md.

    python -P examples/quality/heads.py [--trials 6] [--context 1024] [--budgets 0.2,0.1] [--seed 7]

As masks.py, without a replay, with the question inside the prompt too, and with text. Nothing of kvpass is used; the
question and the answer stay whole. Writes examples/quality/results/heads/<date>-<machine>.json.
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

import torch
from bench import machine
from torch import Tensor
from torch.nn.functional import max_pool1d
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from quality.masks import Masked, flat
from quality.measure import compared
from quality.prompts import Prompts
from quality.run import listed
from quality.tasks.needles import TASKS

QUERIES, NEAR, BLOCK, STEPS = 64, 128, 256, 64
"""Of the window; tokens that are not far; queries whose probabilities are held at once; tokens of text."""

Seen = dict[str, Tensor]


def place(score: Tensor) -> Tensor:
    """Ranks of keys in their heads, the best 0."""
    return score.argsort(-1, descending=True).argsort(-1).float()


def alone(score: Tensor, slots: float, tail: int) -> Tensor:
    """As `flat`, each head by itself."""
    heads = [flat(head[None, None], slots, tail) for head in score.flatten(0, 1)]
    return torch.cat(heads).view_as(score)


def layered(score: Tensor, slots: float, tail: int) -> Tensor:
    return torch.cat([flat(layer[None], slots, tail) for layer in score])


def reach(sharp: float, heard: float, shared: Callable[..., Tensor] = flat) -> Callable[[Seen, float], Tensor]:
    """What a head finds far back, over the rank of its key: the sum of two."""

    def rule(seen: Seen, slots: float) -> Tensor:
        most = seen["most"][..., 4:-NEAR].mean(-1, keepdim=True)
        unlike, pooled = seen["unlike"], max_pool1d(seen["window"], 5, 1, 2)
        order = place(-(place(unlike) + heard * place(pooled)))
        return shared(most**sharp / (1 + order), slots, int(0.1 * slots))

    return rule


def turns(sharp: float, heard: float) -> Callable[[Seen, float], Tensor]:
    """The policy kvpass: the better of both ranks instead of their sum, so that two lists take turns."""

    def rule(seen: Seen, slots: float) -> Tensor:
        most = seen["most"][..., 4:-NEAR].mean(-1, keepdim=True)
        order = place(-torch.minimum(place(seen["unlike"]), (place(seen["window"]) + 0.5) / heard))
        return flat(most**sharp / (1 + order), slots, int(0.1 * slots))

    return rule


RULES: dict[str, Callable[[Seen, float], Tensor]] = {
    "h2o: all queries' sums, half of the newest, heads alike": lambda s, n: alone(s["sum"], n, int(n / 2)),
    "snapkv: the window's sums, heads alike": lambda s, n: alone(max_pool1d(s["window"], 7, 1, 3), n, 32),
    "keydiff, heads alike": lambda s, n: alone(s["unlike"], n, int(0.1 * n)),
    "the most that a query 64 later gave, one ranking": lambda s, n: flat(s["later"], n, int(0.1 * n)),
    "reach, a quarter of the window's rank": reach(1, 0.25),
    "reach ^ 1.5, a quarter": reach(1.5, 0.25),
    "reach ^ 2, a quarter": reach(2, 0.25),
    "reach ^ 2, half": reach(2, 0.5),
    "reach ^ 2, all": reach(2, 1),
    "reach ^ 3, half": reach(3, 0.5),
    "reach ^ 2, half, within each layer": reach(2, 0.5, layered),
    "reach ^ 2, lists by turns": turns(2, 0.5),
    "reach ^ 2, lists by turns, a quarter heard": turns(2, 0.25),
    "reach ^ 1.5, lists by turns": turns(1.5, 0.5),
}


class Once(Masked):
    """Listens to a prompt while it is read."""

    def listen(self, module: Any, q: Tensor, k: Tensor, v: Tensor, sees: Tensor, scale: float) -> None:
        assert self.heard is not None
        tokens, total, later = k.shape[1], torch.zeros(k.shape[:2]), torch.zeros(k.shape[:2])
        for start in range(0, tokens, BLOCK):
            rows = torch.arange(start, min(start + BLOCK, tokens))
            logits = q[:, :, rows] @ k[:, None].mT * scale
            probs = logits.masked_fill(~sees[rows], -math.inf).softmax(-1)
            total += probs.mean(1).sum(1)
            far = rows[:, None] - torch.arange(tokens) >= 64
            later = torch.maximum(later, (probs * far).amax((1, 2)))
        window = (q[:, :, -QUERIES:] @ k[:, None].mT * scale).masked_fill(~sees[-QUERIES:], -math.inf).softmax(-1)
        unit = k / k.norm(dim=-1, keepdim=True)
        found = {"sum": total, "later": later, "window": window.mean(1).sum(1), "most": window.amax((1, 2))}
        found["unlike"] = -(unit @ unit.mean(1)[:, :, None])[..., 0]
        for name, value in found.items():
            self.heard[name][module.layer_idx] = value

    def scores(self, ids: list[int], cache: Any) -> Seen:
        """Of a prompt that is read into the cache: [layers, Hkv, T] by kind."""
        config = self.model.config
        sizes = config.num_hidden_layers, config.num_key_value_heads, len(ids)
        self.heard = found = {kind: torch.zeros(sizes) for kind in ("sum", "later", "window", "most", "unlike")}
        self.run(ids, cache)
        self.heard = None
        return found


def trial(once: Once, prompts: Prompts, index: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each budget and rule: the answers to three questions in either mode, and the KL of a text."""
    rules = [(1.0, "full"), *((budget, name) for budget in args.budgets for name in RULES)]
    rows: dict[tuple[float, str], dict[str, Any]] = {
        key: {"budget": key[0], "rule": key[1], "aware": {}, "agnostic": {}, "kl": 0.0} for key in rules
    }

    def kept(key: tuple[float, str], seen: Seen, length: int) -> Tensor | None:
        return None if key[1] == "full" else RULES[key[1]](seen, key[0] * length)

    own = prompts.trial(args.context, index)
    for mode, tasks in (("agnostic", [None]), ("aware", [*TASKS])):
        for task in tasks:
            ids, cache = prompts.prompt(own, args.context, mode, task), DynamicCache(config=once.model.config)
            seen = once.scores(ids, cache)
            for key, row in rows.items():
                stays = kept(key, seen, len(ids))
                for asked in TASKS if task is None else [task]:
                    row[mode][asked] = answer(once, prompts.follow_up(own, mode, asked), own, asked, cache, stays)
    text, cache = prompts.plain(args.context, index, STEPS + 1), DynamicCache(config=once.model.config)
    ids, rest = text[: args.context], text[args.context : -1]
    seen = once.scores(ids, cache)
    full = follow(once, rest, cache, None)
    for key, row in rows.items():
        row["kl"] = compared(full, follow(once, rest, cache, kept(key, seen, len(ids))))["kl"][0]
    return list(rows.values())


def follow(once: Once, ids: list[int], cache: Any, stays: Tensor | None) -> Tensor:
    """Log-likelihoods [1, tokens, words] behind a prompt, of which the cache forgets nothing."""
    once.kept = stays
    found = once.run(ids, cache, len(ids))[None]
    once.kept = None
    cache.crop(-len(ids))
    return found


def answer(once: Once, lead: list[int], own: Any, task: str, cache: Any, stays: Tensor | None) -> dict[str, Any]:
    gold = torch.tensor(own.questions[task].gold)
    logp = follow(once, [*lead, *gold[:-1].tolist()], cache, stays)[0, -len(gold) :]
    right = logp.argmax(-1) == gold
    return {"right": bool(right.all()), "nll": float(-logp.gather(-1, gold[:, None]).mean())}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, means over the trials."""
    lines = ["| budget | what chooses | asked later | in the prompt | KL |", "| --- | --- | --- | --- | --- |"]
    for key in dict.fromkeys((row["budget"], row["rule"]) for row in rows):
        own, cells = [row for row in rows if (row["budget"], row["rule"]) == key], []
        for mode in ("agnostic", "aware"):
            found = [one for row in own for one in row[mode].values()]
            nll = sum(one["nll"] for one in found) / len(found)
            cells.append(f"{sum(one['right'] for one in found)} of {len(found)}, {nll:.2f}")
        kl = sum(row["kl"] for row in own) / len(own)
        lines.append(f"| {key[0]:.0%} | {key[1]} | {' | '.join(cells)} | {kl:.3f} |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--budgets", type=lambda text: [float(part) for part in listed(text)], default=[0.2, 0.1])
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    once, rows = Once(), list[dict[str, Any]]()
    prompts, facts = Prompts(once.tokenizer, args.seed), machine.describe()
    command = shlex.join(["python", "-P", "examples/quality/heads.py", *sys.argv[1:]])
    folder = Path(__file__).parent / "results" / "heads"
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(args.trials):
        rows += [{"trial": index, **row} for row in trial(once, prompts, index, args)]
        print(f"{index + 1} of {args.trials}\n{table(rows)}", flush=True)
        whole = {"date": date.today().isoformat(), "command": command, "machine": facts, "rows": rows}
        (folder / f"{whole['date']}-{machine.slug(facts)}.json").write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
