"""How long the cells still to do will take, from what was measured: finished cells, or a short probe of the model."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import DynamicCache

from quality.measure import Lab
from quality.prompts import MODES
from quality.reference import call
from quality.store import Cell, Store
from quality.tasks import kinds_of

PROBE_TOKENS, PROBE_STEPS = 256, 6
SLOWER = 1.3  # scoring and selection, over the plain model
CAPTURE_S = 15.0  # Dynamo, three or four graphs of 30 layers; on one loaded core twice that


@torch.no_grad()
def probe(lab: Lab, rows: int) -> tuple[float, float]:
    """Seconds for one token of a prompt, and for one step of `rows` rows."""
    ids, cache = torch.ones(rows, PROBE_TOKENS, dtype=torch.long), DynamicCache(config=lab.model.config)
    call(lab.model, ids[:, :8], DynamicCache(config=lab.model.config))
    start = time.perf_counter()
    call(lab.model, ids, cache)
    middle = time.perf_counter()
    for _ in range(PROBE_STEPS):
        call(lab.model, ids[:, :1], cache)
    end = time.perf_counter()
    return (middle - start) / ids.numel(), (end - middle) / PROBE_STEPS


def cell_seconds(lab: Lab, context: int, timing: tuple[float, float]) -> float:
    """One cell by the probe: prompts (aware for each task, agnostic for each kind, text), steps, capture."""
    token_s, step_s = timing
    kinds = kinds_of(lab.settings.tasks)
    asked = [question for kind in kinds for question in lab.prompts.trial(context, 0, kind).questions.values()]
    prompts = (len(asked) + len(kinds) + 1) * lab.settings.trials * context * token_s * SLOWER
    follow = sum(len(q.steps) + 2 + len(q.gold) + sum(map(len, q.rivals)) for q in asked)
    return prompts + (2 * lab.settings.steps + len(MODES) * follow) * step_s + CAPTURE_S


def estimate(lab: Lab, store: Store, todo: list[Cell], jobs: int = 1) -> tuple[float, str]:
    """Seconds for all of `todo`, so many at a time, and what that rests on."""
    known: dict[int, list[float]] = {}
    for found in store.cells():
        known.setdefault(found["context"], []).append(found["seconds"])
    unknown = [cell for cell in todo if cell.context not in known]
    timing = probe(lab, min(4, lab.settings.trials)) if unknown else (0.0, 0.0)
    total = sum(cell_seconds(lab, cell.context, timing) for cell in unknown)
    total += sum(statistics.median(known[cell.context]) for cell in todo if cell.context in known)
    return total / jobs, "a probe of the model" if unknown else "the median of finished cells"


def minutes(seconds: Any) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
