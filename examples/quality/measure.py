"""One cell: answers to questions inside and after the prompt, and the continuation of plain text.

A prompt is one call, and is compressed at its end. What follows, question or not, comes in a second call of several
tokens and then token by token, so that nothing that is judged has seen the whole prompt.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from quality.judge import judged, only, spans_of
from quality.prompts import MODES, Prompts
from quality.reference import Reference, call, follow
from quality.store import Cell, Settings
from quality.tasks import kinds_of
from quality.tasks.trial import Kind, Trial
from quality.versus import spec_of

BATCH_TOKENS = 8192
"""Prompt tokens in one call, at most (one row always fits)."""

Say = Callable[[str], None]
Entry = dict[str, Any]
"""Of one answer: `right`, `digits` (its right tokens), `nll`; where it stands in the text, `kept` and `gone`."""


def batch_rows(trials: int, context: int) -> int:
    """Rows of a call: a divisor of `trials`, so that every call has one shape and nothing is compiled twice."""
    most = max(1, BATCH_TOKENS // context)
    return max(size for size in range(1, trials + 1) if trials % size == 0 and size <= most)


def chunks(rows: list[Any], size: int) -> list[list[Any]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


class Lab:
    """A model, the prompts for it, and kvpass. `quality.peer` has another library in its place."""

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.prompts = Prompts(tokenizer, settings.seed)

    def trials(self, context: int, kind: Kind) -> list[list[Trial]]:
        size = batch_rows(self.settings.trials, context)
        return chunks([self.prompts.trial(context, i, kind) for i in range(self.settings.trials)], size)

    def plain_chunks(self, context: int) -> list[torch.Tensor]:
        n, steps = self.settings.trials, self.settings.steps
        rows = [self.prompts.plain(context, i, steps + 1) for i in range(n)]
        return [torch.tensor(part) for part in chunks(rows, batch_rows(n, context))]

    def compiled(self, cell: Cell) -> Any:
        """A fresh model under this cell's policy; nothing that was compiled before is left."""
        import kvpass

        torch._dynamo.reset()
        return kvpass.compile(self.model, spec_of(cell.policy), cell.budget, inner="eager")

    def capture_seconds(self, model: Any) -> float:
        return float(model.kvpass.timings["capture"])

    @contextmanager
    def decoding(self, cell: Cell, slots: int, prompt: int) -> Iterator[Any]:
        """The model, holding so many slots a head, on average, while tokens come one by one after a prompt."""
        import kvpass

        torch._dynamo.reset()
        keep = 1.0 if cell.policy == "full" else slots
        yield kvpass.compile(self.model, spec_of(cell.policy), keep, inner="eager")

    def held(self, cache: Any) -> dict[str, Any]:
        """What a cache holds, and what a dense one would, in bytes; layers that slide over a window not counted."""
        import kvpass

        report = kvpass.report(cache).to_dict()
        dense = sum(site["dense_bytes"] for site in report["sites"])
        return {"bytes": report["slot_bytes"], "dense_bytes": dense} | {
            key: report[key] for key in ("overhead_bytes", "tokens")
        }

    def left_of(self, cache: Any, spans: list[Any]) -> list[Entry | None] | None:
        """What is left of one span in each row (None: it has none there), as `kvpass.report` says; None if the library
        does not say which positions it holds.
        """
        import kvpass

        if not any(spans):
            return [None] * len(spans)
        rows = {row["row"]: row for row in kvpass.report(cache, {"answer": spans}).to_dict()["spans"]}
        return [rows.get(at) for at in range(len(spans))]

    def positions(self, cache: Any) -> list[torch.Tensor] | None:
        """Kept positions `[B, Hkv, n]` of each layer, -1 = none; None if the library does not say."""
        import kvpass

        return [view.positions for view in kvpass.inspect(cache).layers]

    def cache(self) -> Any:
        return DynamicCache(config=self.model.config)


@torch.no_grad()
def measure(
    lab: Lab, cell: Cell, reference: Reference, say: Say, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Everything about one cell, per trial and per text, as plain data; of what is `known`, only the tasks it lacks."""
    model, start = lab.compiled(cell), time.perf_counter()
    retrieval = {mode: dict(known["retrieval"][mode]) if known else {} for mode in MODES}
    todo = tuple(task for task in lab.settings.tasks if task not in retrieval["agnostic"])
    for kind in kinds_of(todo):
        asked = [task for task in kind.tasks if task in todo]
        for part in lab.trials(cell.context, kind):
            for mode in MODES:
                say(f"{kind.name}, {mode}")
                for task, found in answers(lab, model, cell.context, part, mode, asked).items():
                    retrieval[mode].setdefault(task, []).extend(found)
    found = {"text": known["text"], "held": known["held"]} if known else {}
    if not known:
        say("text")  # last: its first decode step would be compiled for one length alone
        found["text"], found["held"] = continuation(lab, model, cell, reference)
    spent = time.perf_counter() - start + (known["seconds"] if known else 0.0)
    return {**found, "retrieval": retrieval, "seconds": spent, "capture_seconds": lab.capture_seconds(model)}


def answers(
    lab: Lab, model: Any, context: int, trials: list[Trial], mode: str, tasks: list[str]
) -> dict[str, list[Entry]]:
    """By task, one entry for each trial. Without the question in it, one compressed prompt serves all tasks."""
    found, shared = {}, None
    for task in tasks:
        if mode == "aware" or shared is None:
            prompts = [lab.prompts.prompt(trial, context, mode, task) for trial in trials]
            shared = lab.cache()
            call(model, torch.tensor(prompts), shared)
        cache = copy.deepcopy(shared) if mode == "agnostic" else shared
        asked = [trial.questions[task] for trial in trials]
        for column in zip(*(one.steps for one in asked), strict=True):
            call(model, torch.tensor(column)[:, None], cache)
        fed = [[*prompt, *one.steps] for prompt, one in zip(prompts, asked, strict=True)]
        left = lab.left_of(cache, spans_of(fed, asked))
        second = torch.tensor([lab.prompts.follow_up(trial, mode, task) for trial in trials])
        found[task] = [{**entry, **only(left, at)} for at, entry in enumerate(judged(model, cache, second, asked))]
    return found


def continuation(lab: Lab, model: Any, cell: Cell, reference: Reference) -> tuple[dict[str, list[float]], dict]:
    """Likelihoods along the true text and along the full cache's own text; one value for each text."""
    out: dict[str, list[float]] = {}
    size = batch_rows(lab.settings.trials, cell.context)
    held: dict[str, Any] = {}
    for at in range(0, lab.settings.trials, size):
        part = Reference(*(value[at : at + size] for value in vars(reference).values()))
        for key, values in text_rows(lab, model, part, held).items():
            out.setdefault(key, []).extend(values)
    return out, held


def text_rows(lab: Lab, model: Any, part: Reference, held: dict[str, Any]) -> dict[str, list[float]]:
    cache, steps = lab.cache(), lab.settings.steps
    call(model, part.prompt, cache)
    held.update(lab.held(cache))
    other, positions = copy.deepcopy(cache), lab.positions(cache)
    mass = [] if positions is None else mass_kept(positions, part.mass)
    along = follow(model, cache, part.truth[:, :steps])
    nll = -along.gather(-1, part.truth[:, 1:, None])[..., 0]
    true, own = compared(part.truth_logp, along), compared(part.greedy_logp, follow(model, other, part.greedy))
    return {
        "mass": mass,
        "nll": nll.mean(-1).tolist(),
        "kl": true["kl"],
        "agree": true["agree"],
        "kl_greedy": own["kl"],
        "agree_greedy": own["agree"],
    }


def compared(full: torch.Tensor, kept: torch.Tensor) -> dict[str, list[float]]:
    """KL(full cache || policy) in nats, and how often both find the same token most likely; means over the steps."""
    kl = (full.exp() * (full - kept)).sum(-1).mean(-1)
    agree = (full.argmax(-1) == kept.argmax(-1)).float().mean(-1)
    return {"kl": kl.tolist(), "agree": agree.tolist()}


def mass_kept(kept: list[torch.Tensor], mass: torch.Tensor) -> list[float]:
    """Share of the full cache's attention to the prompt that falls on kept positions; mean of layers and heads."""
    shares = []
    for layer, own in enumerate(kept):
        positions = own.repeat_interleave(mass.shape[2] // own.shape[1], dim=1)
        found = mass[:, layer].gather(-1, positions.clamp(min=0)).masked_fill(positions < 0, 0.0)
        shares.append(found.sum(-1).mean(-1))
    return torch.stack(shares).mean(0).tolist()
