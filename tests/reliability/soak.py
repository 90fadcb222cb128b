"""One compiled model for a long time: a text of 20,000 tokens at a fixed budget, and 300 short conversations.

Bytes of live tensors and of the process are read while it runs; graphs are counted. What was kept at each step goes
into memory that was there before, and is judged afterwards (`judged`), so that the oracle's own cache, which grows, is
not in the measurement.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from models import tiny
from models.memory import all_bytes, live
from models.turns import GREEDY
from oracle.drive import compare_logits
from oracle.hf import Oracle
from spelling import cache_of, with_cache
from torch._dynamo.utils import counters
from transformers import DynamicCache

import kvpass

POLICY, BUDGET, SAMPLES = "h2o", 64, 200
WARM_UP = 64
"""Steps after which memory is compared: what is compiled and cached once is there."""
FLAT = 0.02
"""Largest growth of the process' memory."""

Tell = Callable[[int, int], Any]
"""Is told how much is done, and of how much."""


@dataclass
class Found:
    """Of a soak.

    Attributes:
        live, resident: bytes of live tensors and of the process, at each reading after the warm-up.
        graphs: compiled until the warm-up was over, and after it.
    """

    done: int = 0
    live: list[int] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    graphs: tuple[int, int] = (0, 0)

    def read(self, done: int) -> None:
        self.done = done
        self.live.append(all_bytes([*live().values()]))
        self.resident.append(psutil.Process().memory_info().rss)

    def check(self) -> None:
        assert max(self.live) - min(self.live) <= 1024, f"live bytes {self.live}"
        growth = max(self.resident) / self.resident[0] - 1
        assert growth <= FLAT, f"the process grew by {growth:.1%}: {self.resident}"
        assert self.graphs[0] == self.graphs[1], f"{self.graphs} graphs"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Text:
    """A text of so many tokens, word by word, and what was kept and said after each."""

    def __init__(self, tokens: int) -> None:
        self.model = tiny.llama(layers=1)
        self.ids = tiny.tokens(1, tokens, seed=3)
        self.kept = np.full((tokens, 2, BUDGET), -1, dtype=np.int32)
        self.logits = np.zeros((tokens, self.model.config.vocab_size), dtype=np.float32)

    def soak(self, readings: int = 20, tell: Tell = lambda *_: None) -> Found:
        run, found, total = kvpass.compile(self.model, POLICY, BUDGET, inner="eager"), Found(), self.ids.shape[1]
        cache = DynamicCache(config=self.model.config)
        every = max((total - WARM_UP) // readings, 1)
        for at in range(total):
            with torch.no_grad():
                out = run(self.ids[:, at : at + 1], **with_cache(run, cache), use_cache=True)
            (layer,) = kvpass.inspect(cache).layers
            self.kept[at, :, : layer.positions.shape[2]] = layer.positions[0]
            self.logits[at] = out.logits[0, -1]
            if at + 1 == WARM_UP:
                found.graphs = (_graphs(), 0)
            if at + 1 >= WARM_UP and (at + 1 - WARM_UP) % every == 0:
                del out, layer
                found.read(at + 1)
                tell(at + 1, total)
        found.graphs = (found.graphs[0], _graphs())
        return found

    def judged(self, samples: int, tell: Tell = lambda *_: None) -> int:
        """Compare logits with the oracle's at as many steps, and what is kept at every one of them. Returns how many
        choices float32 may have made otherwise than float64, and did.
        """
        judge, total = Oracle(self.model, POLICY, BUDGET), self.ids.shape[1]
        every = max(total // samples, 1)
        for at in range(total):
            want = judge(self.ids[:, at : at + 1])
            judge.simulator.follow([torch.from_numpy(self.kept[at][None])])
            judge.simulator.history.clear()
            if (at + 1) % every == 0:
                compare_logits(torch.from_numpy(self.logits[at][None]), want)
                tell(at + 1, total)
        return judge.simulator.near_ties


def conversations(count: int, tell: Tell = lambda *_: None) -> Found:
    """Prompts of 20 to 90 tokens, two turns of a few tokens each, on one compiled model; each cache is dropped."""
    run, found = kvpass.compile(tiny.llama(layers=1), POLICY, BUDGET, inner="eager"), Found()
    warm = max(count // 10, 4)
    for at in range(count):
        ids = tiny.tokens(1 + at % 2, 20 + at * 37 % 71, seed=at)
        cache = None
        for turn in range(2):
            given = {} if cache is None else with_cache(run, cache)
            out = run.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, **GREEDY, **given)
            cache = cache_of(out)
            ids = torch.cat([out.sequences, tiny.tokens(len(ids), 3 + turn, seed=at)], 1)
        assert kvpass.Cache(cache).tokens == out.sequences.shape[1] - 1
        if at + 1 == warm:
            found.graphs = (_graphs(), 0)
        if at + 1 >= warm and (at + 1 - warm) % max(count // 20, 1) == 0:
            del out, cache, given, ids
            found.read(at + 1)
            tell(at + 1, count)
    found.graphs = (found.graphs[0], _graphs())
    return found


def _graphs() -> int:
    gc.collect()
    return int(counters["stats"]["unique_graphs"])
