"""The search: one candidate after the other, on one window after the other, for as long as it keeps up.

What a candidate costs is mostly the tracing of its graphs, so none is taken up a second time, as rounds of successive
halving would do: it goes on while it is not clearly behind the best of its kind on the same windows. Then settings are
laid over the best of each kind.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kvpass.errors import KVPassError
from kvpass.tune.candidates import KINDS, Candidate, candidate, moves
from kvpass.tune.judge import Judge
from kvpass.tune.record import Record, Row
from kvpass.tune.windows import Window, Windows

GATES = {2: 1.25, 4: 1.05}
"""After so many windows a candidate goes on if its loss is at most so many times the best one's on the same."""

STARTS = 0.6
"""Share of the time for policies to start from; what is left is for settings laid over the best of them."""

OVER = 1.05
"""A candidate may hold so much more than the default policy does: policies keep statistics of
different sizes beside the same slots."""

FULL = 0.95
"""Codes that hold less than this share of what they may hold every token."""

STEPWISE = 1.4
"""Windows of the report take so many times those of the search: their steps are traced and timed too."""

Say = Callable[[str, Row | None], None]


class Clock:
    """Minutes of a search, over all of its runs."""

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.before, self._now, self._start = 60 * minutes, 0.0, now, now()

    @property
    def spent(self) -> float:
        return self.before + self._now() - self._start

    @property
    def left(self) -> float:
        return self.seconds - self.spent


@dataclass
class Race:
    """Chooses by the search windows, and reports by those that are held out.

    Attributes:
        start: candidates to start from; the first is the default, which all windows are measured on.
        budget, without: what settings are made with (`candidates.moves`).
        judged: `both`, `text` or `copy`: what the loss is of.
        limit: bytes that a candidate may hold, as a share of an unmodified cache's; None: what the default holds.
    """

    judge: Judge
    windows: Windows
    start: list[Candidate]
    budget: int | float | str
    without: set[str]
    judged: str
    record: Record
    clock: Clock
    say: Say
    limit: float | None = None
    made: dict[str, Candidate] = field(default_factory=dict)

    def run(self) -> None:
        """Search until nothing is left to try, or time for the report alone."""
        default = self.start[0]
        self._try(default)
        self._remember()
        if self.record.rows[default.key].error:
            raise KVPassError(
                f"the default policy cannot run: {self.record.rows[default.key].error}",
                where=default.name,
                hint="kvpass.explain(model, ...) says what of the model is matched",
            )
        pending = [*self.start[1:]]
        while pending and self._time(STARTS):
            self._try(pending.pop(0))
        for one in self._settings():
            if not self._time():
                return
            self._try(one)
        while pending and self._time():
            self._try(pending.pop(0))

    def finals(self) -> list[Candidate]:
        """Measure on the held-out windows: the default, and the best of each kind, the best of all first."""
        chosen = {one.key: one for one in (*self.leaders(), self.start[0])}
        for one in chosen.values():
            row = self.record.rows[one.key]
            first = one.key in (self.start[0].key, next(iter(chosen)))
            if not first and self._final_seconds(one.key) + self._final_seconds(self.start[0].key) > self.clock.left:
                continue  # the time is for the best and the default
            if not row.held_out and not row.error:
                self.say(f"{one.name} on the held-out text", None)
                self._measure(one, row, self.windows.held_out, row.held_out, stepwise=True)
        return [*chosen.values()]

    def winner(self, finals: list[Candidate]) -> tuple[Candidate, str]:
        """The best by the search windows, and what the held-out ones say of it; the default if it is worse."""
        default, rows = self.start[0], self.record.rows
        best = next((one for one in finals if rows[one.key].held_out), default)
        shared = min(len(rows[one.key].held_out) for one in (default, best))
        own, loss = (self.loss(rows[one.key], shared, held_out=True) for one in (default, best))
        if best.key == default.key:
            return default, f"nothing was better than the default; its loss on the held-out text is {own:.4f}"
        verdict = f"loss on the held-out text {loss:.4f}, the default's ({default.name}) {own:.4f}"
        if loss > own:
            return default, f"chosen was {best.name}, but: {verdict}. So this is the default"
        return best, verdict

    def leaders(self) -> list[Candidate]:
        """The best of each kind that was measured on all search windows and holds no more than allowed, best first."""
        found = [best for kind in KINDS if (best := self._best(kind)) is not None]
        return sorted(found, key=lambda one: self.loss(self.record.rows[one.key]))

    def loss(self, row: Row, windows: int | None = None, held_out: bool = False) -> float:
        """Nats a token: the mean over the first so many windows (None: all that it has)."""
        return statistics.mean(losses(row.held_out if held_out else row.search, self.judged)[:windows])

    def allowed(self, row: Row) -> bool:
        """Whether it holds no more bytes than it may."""
        return bool(row.search[0]["held"] <= OVER * self._most)

    @property
    def _most(self) -> float:
        return max(float(self.record.rows[self.start[0].key].search[0]["held"]), self.limit or 0.0)

    def _best(self, kind: str) -> Candidate | None:
        whole = [
            one
            for one in self.made.values()
            if one.kind == kind
            and len((row := self.record.rows[one.key]).search) == len(self.windows.search)
            and self.allowed(row)
        ]
        return min(whole, key=lambda one: self.loss(self.record.rows[one.key]), default=None)

    def _remember(self) -> None:
        """Take part in what earlier runs measured, all of it."""
        for row in [row for row in self.record.rows.values() if row.over and row.kind not in self.without]:
            one = candidate(row.name, row.data, self.budget)
            self.made.setdefault(one.key, one)

    def _settings(self) -> Iterator[Candidate]:
        """Climb from the best of each kind in turn; from a better one, as soon as there is one."""
        seen: set[str] = set()
        while "settings" not in self.without:
            fresh = [self._move(best, seen) for best in self.leaders()]
            if not any(fresh):
                return
            yield from (one for one in fresh if one is not None)

    def _move(self, base: Candidate, seen: set[str]) -> Candidate | None:
        room = base.kind == "codes" and self.record.rows[base.key].search[0]["held"] < FULL * self._most
        for one in moves(base, self.budget, self.without):
            if room and one.policy.store == base.policy.store:
                continue  # nothing was evicted: what ranks or protects slots changes nothing
            if one.key not in seen and one.key not in self.made:
                seen.add(one.key)
                return one
        return None

    def _time(self, share: float = 1.0) -> bool:
        """Whether one more candidate fits into this share of the time, beside the report."""
        usual = statistics.mean([row.seconds for row in self.record.rows.values()])
        report = self._report_seconds()
        return self.clock.spent < share * (self.clock.seconds - report) and self.clock.left > report + usual

    def _report_seconds(self) -> float:
        """That the held-out windows will take, of all that would be measured on them now."""
        chosen = {one.key: one for one in (*self.leaders(), self.start[0])}
        return sum(self._final_seconds(key) for key in chosen)

    def _to_come(self, one: Candidate) -> float:
        """Seconds of the report beside this finalist: the default is measured last."""
        return 0.0 if one.key == self.start[0].key else self._final_seconds(self.start[0].key)

    def _final_seconds(self, key: str) -> float:
        row = self.record.rows[key]
        if not row.search or row.held_out:
            return 0.0
        return STEPWISE * row.seconds * len(self.windows.held_out) / len(row.search)

    def _try(self, one: Candidate) -> None:
        """Measure it, or take what the record has."""
        self.made[one.key] = one
        row = self.record.rows.get(one.key)
        if row is None or not (row.over or row.error):
            row = self.record.rows.setdefault(one.key, Row(one.name, one.data, one.kind))
            self.say(one.name, None)
            self._measure(one, row, self.windows.search, row.search)
        self.say(one.name, row)

    def _measure(
        self,
        one: Candidate,
        row: Row,
        windows: tuple[Window, ...],
        found: list[dict[str, Any]],
        stepwise: bool = False,
    ) -> None:
        start = self.clock.spent
        found.clear()  # of a run that was cut off: its first window would be timed with tracing in it
        try:
            for marks in self.judge.trial(one, iter(windows), stepwise):
                found.append(marks.to_dict())
                if not stepwise and one is not self.start[0] and self._behind(one, row):
                    break
                if stepwise and len(found) >= 2 and self.clock.left < self._to_come(one):
                    break  # two windows are the least that an interval needs
        except KVPassError as error:
            row.error = error.what
        except Exception as error:  # of the model's own code, under this policy: the others go on
            row.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        row.over = True
        row.seconds += self.clock.spent - start
        self.record.spent = self.clock.spent
        self.record.save()

    def _behind(self, one: Candidate, row: Row) -> bool:
        """Whether it is clearly behind the best of its kind on as many windows, holds too much, or takes too long."""
        if not self.allowed(row) or self.clock.left < self._report_seconds():
            return True
        best, number = self._best(one.kind), len(row.search)
        if best is None or number not in GATES:
            return False
        return self.loss(row) > GATES[number] * self.loss(self.record.rows[best.key], number)


def losses(marks: list[dict[str, Any]], judged: str) -> list[float]:
    """Nats a token on each window: the mean of both, or one of them."""
    if judged == "both":
        return [(mark["text"] + mark["copy"]) / 2 for mark in marks]
    return [mark[judged] for mark in marks]
