"""A state machine over everything that is done to a cache, against the lists of `plain.py`.

Each example draws a policy and does some eight things in any order to up to three caches; one that fails prints its
calls. After each, what was touched is looked at; when a cache is left, each of its rows is lived again alone.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from reliability import mistakes
from reliability.broken import ERRORS
from reliability.plain import Call
from reliability.policies import VOCABULARY
from reliability.talk import DONE, Desk, Talk

import kvpass
from kvpass.errors import StaleCacheError

DEPTH = 6
"""How many tentative tokens can be taken back over calls."""
MOST_CACHES, MOST_ROWS, STEPS = 3, 4, 7

WHICH = st.integers(0, MOST_CACHES - 1)
LENGTHS = st.lists(st.integers(2, 30), min_size=2, max_size=3)
MORE = st.lists(st.integers(2, 9), min_size=MOST_ROWS, max_size=MOST_ROWS)
"""Two rows at least: Dynamo has graphs of their own for one row, and for one token in a prompt."""
PICKS = st.lists(st.integers(0, MOST_ROWS - 1), min_size=2, max_size=3)


def through_torch(host: Any) -> Any:
    file = io.BytesIO()
    torch.save(host, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Any] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda host: pickle.loads(pickle.dumps(host)),
    "torch.save": through_torch,
}


class Machine(RuleBasedStateMachine):
    """What hypothesis calls; `which` picks one of the caches."""

    def __init__(self) -> None:
        super().__init__()
        self.talks: list[Talk] = []
        self.words = itertools.count()
        self.folder = TemporaryDirectory()

    @rule(lengths=LENGTHS)
    def prompt(self, lengths: list[int]) -> None:
        """Rows of so many tokens, padded on the left."""
        talk = Talk.empty(self.desk, len(lengths))
        talk.call(self.drawn(lengths))
        self.keep(talk)

    @rule(which=WHICH, lengths=MORE)
    def append(self, which: int, lengths: list[int]) -> None:
        """A call of several tokens, not equally many for all rows."""
        talk = self.talk(which)
        talk.call(self.drawn(lengths[: talk.rows]))

    @rule(which=WHICH, count=st.integers(1, 3))
    def step(self, which: int, count: int) -> None:
        """Calls of one token; they confirm what is tentative."""
        talk = self.talk(which)
        for _ in range(count):
            talk.call(self.drawn([1] * talk.rows))

    @rule(which=WHICH, count=st.integers(1, 4))
    def draft(self, which: int, count: int) -> None:
        """Tentative tokens in one call."""
        talk = self.talk(which)
        talk.draft(self.drawn([count] * talk.rows), DEPTH)

    @precondition(lambda self: any(talk.plain.loose for talk in self.talks))
    @rule(which=WHICH, count=st.integers(1, DEPTH), by_host=st.booleans())
    def crop(self, which: int, count: int, by_host: bool) -> None:
        """Tentative tokens are taken back."""
        loose = [talk for talk in self.talks if talk.plain.loose]
        talk = loose[which % len(loose)]
        count = min(count, talk.plain.loose)
        if by_host:
            talk.cache.host.crop(-count)
        else:
            talk.cache.crop(count)
        talk.plain = talk.plain.without(count)
        talk.look("crops")

    @rule(which=WHICH, picks=PICKS, how=st.sampled_from(["reorder_cache", "batch_select_indices"]))
    def reorder(self, which: int, picks: list[int], how: str) -> None:
        """In the host's own cache."""
        talk = self.talk(which)
        rows = [at % talk.rows for at in picks]
        getattr(talk.cache.host, how)(torch.tensor(rows))
        talk.plain = talk.plain.picked(rows)
        talk.look("rows reordered")

    @rule(which=WHICH, picks=PICKS)
    def select(self, which: int, picks: list[int]) -> None:
        talk = self.talk(which)
        rows = [at % talk.rows for at in picks]
        self.keep(talk.also(talk.cache.select(rows), talk.plain.picked(rows)), "rows selected")

    @rule(which=WHICH, by_host=st.booleans())
    def repeat(self, which: int, by_host: bool) -> None:
        talk = self.talk(which)
        rows = [at for at in range(talk.rows) for _ in range(2)]
        if len(rows) > MOST_ROWS:
            return
        if by_host:
            talk.cache.host.batch_repeat_interleave(2)
            talk.plain = talk.plain.picked(rows)
            talk.look("rows repeated")
        else:
            self.keep(talk.also(talk.cache.repeat(2), talk.plain.picked(rows)), "rows repeated")

    @rule(which=WHICH, other=WHICH)
    def merge(self, which: int, other: int) -> None:
        """If evictions wait for equally many steps in both: else some are done early, which no row alone would do."""
        one, two = self.talk(which), self.talk(other)
        waits = (one.plain.steps - two.plain.steps) % self.desk.spec.every
        if waits or one.rows + two.rows > MOST_ROWS:
            return
        self.keep(one.also(kvpass.Cache.merge([one.cache, two.cache]), one.plain.beside(two.plain)), "merges")

    @rule(which=WHICH)
    def fork(self, which: int) -> None:
        talk = self.talk(which)
        self.keep(talk.also(talk.cache.fork(), talk.plain.made()), "forks")

    @rule(which=WHICH, how=st.sampled_from(sorted(COPIES)))
    def copied(self, which: int, how: str) -> None:
        talk = self.talk(which)
        if how != "deepcopy" and talk.plain.cropped:
            with pytest.raises(StaleCacheError, match="cropped"):
                COPIES[how](talk.cache.host)
            return
        plain = talk.plain if how == "deepcopy" else talk.plain.made()
        self.keep(talk.also(kvpass.Cache(COPIES[how](talk.cache.host)), plain), "copies")

    @rule(which=WHICH)
    def save_and_load(self, which: int) -> None:
        talk, path = self.talk(which), Path(self.folder.name) / "cache"
        if talk.plain.cropped:
            with pytest.raises(StaleCacheError, match="cropped"):
                talk.cache.save(path)
            return
        talk.cache.save(path)
        self.keep(talk.also(kvpass.Cache.load(path, self.desk.compiled), talk.plain.made()), "files")

    @rule(which=WHICH, what=st.sampled_from(sorted(mistakes.WRONG)))
    def wrong_call(self, which: int, what: str) -> None:
        talk = self.talk(which)
        if mistakes.may(what, talk):
            mistakes.mistaken(what, talk, self.drawn([1] * talk.rows))
            self.go_on(talk, "wrong calls")

    @rule(which=WHICH, kind=st.sampled_from(sorted(ERRORS)), after=st.integers(1, 60), count=st.integers(1, 4),
          tentative=st.booleans())  # fmt: skip
    def break_off(self, which: int, kind: str, after: int, count: int, tentative: bool) -> None:
        """A call of `count` tokens fails in its middle: in a scorer, for want of memory, by Ctrl-C."""
        talk = self.talk(which)
        words = self.drawn([count] * talk.rows)
        happened = mistakes.broken(kind, after, talk, words, DEPTH if tentative else 0)
        self.go_on(talk, f"calls broken off by {kind}" if happened else "calls")

    def teardown(self) -> None:
        for talk in self.talks:
            talk.leave()
        self.folder.cleanup()

    def talk(self, which: int) -> Talk:
        if not self.talks:
            self.prompt([7, 5])
        return self.talks[which % len(self.talks)]

    def drawn(self, lengths: list[int]) -> list[Call]:
        """Words that were not said yet."""
        return [tuple(1 + next(self.words) * 37 % (VOCABULARY - 1) for _ in range(n)) for n in lengths]

    def keep(self, talk: Talk, what: str = "") -> None:
        """One more cache. The oldest is left if there are too many."""
        self.talks.append(talk)
        if what:
            talk.look(what)
        if len(self.talks) > MOST_CACHES:
            self.talks.pop(0).leave()

    def go_on(self, talk: Talk, what: str) -> None:
        """After an error: with a cache that is untouched, not with one that was left halfway."""
        if mistakes.check_refused(talk, self.drawn([1] * talk.rows), Path(self.folder.name)):
            DONE[f"{what}: refused"] += 1
            self.talks.remove(talk)
        else:
            talk.look(what)


def machine(policies: Sequence[str]) -> type[Machine]:
    """One that draws from these names of `policies.NAMES`."""

    class Drawn(Machine):
        @initialize(policy=st.sampled_from(policies), lengths=LENGTHS)
        def under(self, policy: str, lengths: list[int]) -> None:
            self.desk = Desk(policy)
            DONE["examples"] += 1
            DONE[f"under {policy}"] += 1
            self.prompt(lengths)

    return Drawn


def settings_of(examples: int) -> settings:
    """For so many examples, always the same ones; one that fails is shrunk and prints its calls."""
    return settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
        deadline=None,
    )
