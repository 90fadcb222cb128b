"""One thread that calls the model: requests wait, join the running batch, and leave it.

Between two steps at most one prompt is computed, so that those who generate already wait for one prompt at most. First
come, first served: whoever does not fit yet lets the others wait too, so that nobody waits forever.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import kvpass
from serving import errors
from serving.admission import Admission
from serving.batch import Batch
from serving.metrics import Metrics
from serving.prefixes import Prefixes
from serving.request import Request

log = logging.getLogger("kvpass.serving")


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        rows: requests that generate together.
        queue: requests that wait; more are refused.
        seconds: from its arrival to the end of its answer.
        tokens: of an answer, at most, and where a chat does not say how many.
        context: tokens of a prompt and its answer.
        body: bytes of a request.
    """

    rows: int = 8
    queue: int = 64
    seconds: float = 120.0
    tokens: int = 512
    context: int = 8192
    body: int = 1 << 20


class Engine:
    """
    Attributes:
        held, peak: bytes of all caches together, now and at most so far.
        watched: called with all caches whenever they have changed; for tests.
    """

    def __init__(
        self,
        model: Any,
        ends: frozenset[int],
        admission: Admission,
        prefixes: Prefixes,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self.model, self.ends, self.admission, self.prefixes = model, ends, admission, prefixes
        self.limits, self.metrics = limits, metrics
        self.batch = Batch(model, self._watch)
        self.waiting: deque[Request] = deque()
        self.state = "running"
        self.watched: Callable[[list[kvpass.Cache]], None] = lambda caches: None
        self.held = self.peak = 0
        self._turns, self._seconds = threading.Condition(), 1.0
        self._watch([])
        self._thread = threading.Thread(target=self._run, name="kvpass-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn.

        Raises:
            Refused: it can never fit, too many wait, or the server is shutting down.
        """
        need, limits = request.need, self.limits
        length = len(request.asked.prompt) + request.asked.max_tokens
        if length > limits.context:
            raise errors.too_long(f"prompt and max_tokens are {length} tokens, more than {limits.context}")
        if not self.admission.can_ever(need):
            most, budget = self.admission.alone(need), self.admission.budget
            raise errors.too_long(f"prompt and max_tokens may need {most:,} bytes of cache, of {budget:,}")
        with self._turns:
            if self.state != "running":
                raise errors.draining()
            if len(self.waiting) >= limits.queue:
                raise errors.too_many(self._wait())
            self.waiting.append(request)
            self._counted()
            self._turns.notify_all()

    def cancel(self, request: Request) -> None:
        """Its client is gone: no more steps for it."""
        request.gone = True

    def drain(self, then: Callable[[], None]) -> None:
        """Take no more requests; `then` is called by the engine's thread when all that were taken are answered."""
        with self._turns:
            if self.state == "running":
                self.state, self._then = "draining", then
            self._turns.notify_all()

    def close(self) -> None:
        """Refuse what is left, and end the thread."""
        with self._turns:
            self.state = "closed"
            self._turns.notify_all()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def idle(self) -> bool:
        with self._turns:
            return not self.waiting and not self.batch.requests

    def _run(self) -> None:
        while self._awaited():
            try:
                self._turn()
            except Exception:  # of the batch: a cache whose call failed halfway does not go on
                log.exception("a step failed: its %d requests are refused", len(self.batch.requests))
                for request in self.batch.drop():
                    request.tell(errors.failed())
            if self.idle:
                self._watch([])
        for request in [*self.waiting, *self.batch.drop()]:
            request.tell(errors.draining())
        self.waiting.clear()
        self._watch([])

    def _awaited(self) -> bool:
        """Wait until there is something to do; False if it is to end."""
        with self._turns:
            while not self.waiting and not self.batch.requests and self.state != "closed":
                if self.state == "draining":
                    self._then()
                    self.state = "drained"
                self._turns.wait()
            return self.state != "closed"

    def _turn(self) -> None:
        self._drop_gone()
        self._admit()
        if self.batch.requests:
            logits = self.batch.step()
            self.metrics.steps.inc()
            said = list(zip(self.batch.requests, logits, strict=True))
            self._leave([request for request, row in said if self._said(request, row)])
        self._counted()

    def _drop_gone(self) -> None:
        """Those whose clients left, and those whose time is over."""
        with self._turns:
            over = [request for request in (*self.waiting, *self.batch.requests) if request.gone or request.late]
            for request in over:
                self.metrics.finished.labels("cancelled" if request.gone else "timeout").inc()
                if request in self.waiting:
                    self.waiting.remove(request)
        for request in over:
            if not request.gone:
                request.tell(errors.timed_out(request.seconds))
        self._leave(over)

    def _admit(self) -> None:
        """Compute the prompt of the first who waits, if it fits, and let it join."""
        running = self.batch.requests
        with self._turns:
            needs = [request.need for request in running]
            fits = self.waiting and len(running) < self.limits.rows
            if not fits or not self.admission.can_now(needs, self.waiting[0].need):
                return
            request = self.waiting.popleft()
        try:
            logits, cache = self.batch.begin(request)
            self.metrics.prompted.inc(len(request.asked.prompt))
            self.metrics.reused.inc(len(request.prefix.ids) if request.prefix is not None else 0)
            self.metrics.first.observe(time.monotonic() - request.came)
            if not self._said(request, logits):
                self.batch.join(request, cache)
        except Exception:  # its own cache alone is lost
            log.exception("the prompt of a request failed")
            request.tell(errors.failed())

    def _said(self, request: Request, logits: Any) -> bool:
        """Tell a request's next token; whether it is done."""
        self.metrics.generated.inc()
        if not request.say(logits, self.ends):
            return False
        took = time.monotonic() - request.came
        self._seconds += (took - self._seconds) / 8
        self.metrics.finished.labels("done").inc()
        self.metrics.whole.observe(took)
        return True

    def _leave(self, gone: list[Request]) -> None:
        if gone:
            self.batch.leave(gone)

    def _wait(self) -> int:
        """Seconds until some of those who wait are served, about."""
        return max(1, min(60, ceil(self._seconds * len(self.waiting) / (2 * self.limits.rows))))

    def _watch(self, caches: list[kvpass.Cache]) -> None:
        everything = [*self.prefixes.caches, *caches]
        self.held = kvpass.Cache.held(everything, overhead=True)
        self.peak = max(self.peak, self.held)
        self.metrics.held.set(self.held)
        self.metrics.peak.set(self.peak)
        if self.held > self.admission.budget:  # a bound that does not hold: never seen, and not to be overlooked
            self.metrics.above.inc()
            log.error("caches hold %d bytes, more than the budget of %d", self.held, self.admission.budget)
        self.watched(everything)

    def _counted(self) -> None:
        self.metrics.waiting.set(len(self.waiting))
        self.metrics.running.set(len(self.batch.requests))
        self.metrics.graphs.set(len(self.model.kvpass.graphs))
