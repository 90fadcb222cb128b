"""What one policy costs on one window: the prompt is compressed first, and what is judged comes after it."""

from __future__ import annotations

import copy
import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kvpass.errors import KVPassError
from kvpass.model.asked import CACHES, cache_in
from kvpass.tune.candidates import Candidate
from kvpass.tune.likeness import Outlook, divergence, outlook
from kvpass.tune.windows import Window

STEPS = 32
"""Tokens that are fed one by one where steps are timed; the first half, in which graphs are made, is not."""


@dataclass(frozen=True)
class Marks:
    """Of one policy on one window.

    Attributes:
        text: KL(full cache || policy) of the text's continuation, nats a token.
        copy: the same of passages of the prompt that are read again, behind their cue.
        right: share of those tokens that are the policy's most likely ones.
        steps: the same as `text` where the tokens come one by one; None if that was not asked.
        held: bytes of keys, values, positions and statistics after the prompt, as a share of an unmodified cache's.
        read: seconds that the prompt took, compression included.
        step: seconds of a later token, the median; None if not asked.
    """

    text: float
    copy: float
    right: float
    held: float
    read: float
    steps: float | None = None
    step: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Expected:
    """What the full cache expects on one window, and how often it is right on passages that it reads again."""

    next: Outlook
    passages: tuple[Outlook, ...]
    marks: Marks


@dataclass
class Judge:
    """A model, and who compiles it and tells what a cache holds.

    Attributes:
        model: takes `input_ids` and `use_cache` and returns logits and a cache, as those of transformers do.
        compiled: makes a model that runs under a policy.
        holdings: `kvpass.report(cache).to_dict()`.
        cue: tokens of a passage that are given before it is judged.
    """

    model: Any
    compiled: Callable[[Any, Any], Any]
    holdings: Callable[[Any], dict[str, Any]]
    cue: int
    expected: dict[str, Expected] = field(default_factory=dict)

    def full(self, window: Window, stepwise: bool = False) -> Expected:
        """By the unmodified model, once for each window; `stepwise`: with the seconds of a step."""
        if window.name not in self.expected:
            with torch.no_grad():
                cache, read = self._read(self.model, window)
                follows = self._after(self.model, cache, window.next)
                again = [self._after(self.model, cache, passage) for passage in window.passages]
                times = [seconds for _, seconds in self._steps(self.model, cache, window)] if stepwise else []
            right = statistics.mean(self._right(*pair) for pair in zip(again, window.passages, strict=True))
            step = statistics.median(times[STEPS // 2 :]) if times else None
            marks = Marks(0.0, 0.0, right, 1.0, read, 0.0, step)
            self.expected[window.name] = Expected(outlook(follows), tuple(map(outlook, again)), marks)
        return self.expected[window.name]

    def trial(self, candidate: Candidate, windows: Iterator[Window], stepwise: bool = False) -> Iterator[Marks]:
        """Marks of a candidate on one window after the other; compiled once.

        Raises:
            KVPassError: the model cannot run under this policy.
        """
        torch._dynamo.reset()  # what earlier candidates compiled is not needed again
        model = self.compiled(self.model, candidate.policy)
        for window in windows:
            full = self.full(window)
            with torch.no_grad():
                yield self._marks(model, window, full, stepwise)

    def _marks(self, model: Any, window: Window, full: Expected, stepwise: bool) -> Marks:
        cache, read = self._read(model, window)
        report = self.holdings(cache)
        held = (report["bytes"] + report["overhead_bytes"]) / report["dense_bytes"]
        text = divergence(full.next, self._after(model, cache, window.next)).mean()
        again = [self._after(model, cache, passage) for passage in window.passages]
        pairs = zip(full.passages, again, strict=True)
        copied = torch.stack([divergence(*pair)[self.cue - 1 : -1].mean() for pair in pairs]).mean()
        right = statistics.mean(self._right(*pair) for pair in zip(again, window.passages, strict=True))
        marks = Marks(float(text), float(copied), right, held, read)
        if stepwise:
            rows = [*self._steps(model, cache, window)]
            said = torch.stack([logits for logits, _ in rows])
            first = Outlook(full.next.tokens[:STEPS], full.next.logp[:STEPS])
            later = statistics.median([seconds for _, seconds in rows][STEPS // 2 :])
            marks = Marks(**{**asdict(marks), "steps": float(divergence(first, said).mean()), "step": later})
        if not all(value == value for value in (marks.text, marks.copy)):
            raise KVPassError(f"NaN on {window.name}", hint="load the model in another dtype: --dtype float32")
        return marks

    def _read(self, model: Any, window: Window) -> tuple[Any, float]:
        """The cache after the prompt, and the seconds that it took."""
        known = inspect.signature(self.model.forward).parameters
        short = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        start = self._now()
        out = model(input_ids=self._ids(window.prompt), use_cache=True, **short)
        return cache_in(vars(out) | dict(out)), self._now() - start

    def _after(self, model: Any, cache: Any, tokens: tuple[int, ...]) -> torch.Tensor:
        """Logits [S, V] after each of the tokens, on a copy of the cache."""
        out = model(input_ids=self._ids(tokens), use_cache=True, **{self._name: copy.deepcopy(cache)})
        logits: torch.Tensor = out.logits[0]
        return logits

    def _steps(self, model: Any, cache: Any, window: Window) -> Iterator[tuple[torch.Tensor, float]]:
        """Logits [V] after each of the continuation's first tokens, one call for each, and its seconds."""
        own = copy.deepcopy(cache)
        for token in window.next[:STEPS]:
            ids, start = self._ids((token,)), self._now()
            out = model(input_ids=ids, use_cache=True, **{self._name: own})
            own = cache_in(vars(out) | dict(out))
            yield out.logits[0, -1], self._now() - start

    def _right(self, logits: torch.Tensor, passage: tuple[int, ...]) -> float:
        found = logits[self.cue - 1 : -1].argmax(-1)
        return float((found == torch.tensor(passage[self.cue :], device=found.device)).float().mean())

    @property
    def _name(self) -> str:
        known = inspect.signature(self.model.forward).parameters
        return next((name for name in CACHES if name in known), CACHES[0])

    def _ids(self, tokens: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([tokens], device=next(self.model.parameters()).device)

    def _now(self) -> float:
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
