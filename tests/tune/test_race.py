"""The search over a judge that knows the answer: who goes on, who stops, what is written down, what time allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvpass.errors import KVPassError, PolicyError
from kvpass.tune.candidates import Candidate, bases, candidate, moves
from kvpass.tune.judge import Marks
from kvpass.tune.race import Clock, Race, losses
from kvpass.tune.record import Record
from kvpass.tune.windows import Window, windows_of

LOSSES = {"h2o": 1.0, "snapkv": 0.5, "tova": 3.0, "kvzip": 0.7, "turbo": 0.1, "keydiff": 0.55}
NAMES = [*LOSSES]


class Oracle:
    """Losses by name; `+ sinks 4` halves one. A trial takes 20 seconds and 10 for each window."""

    def __init__(self, held: dict[str, float] | None = None) -> None:
        self.seen: list[tuple[str, str]] = []
        self.held, self.time = held or {}, 0.0

    def trial(self, one: Candidate, windows: Iterator[Window], stepwise: bool = False) -> Iterator[Marks]:
        self.time += 20
        base = one.name.split(" + ")[0]
        if base == "vatp":
            raise KVPassError("it cannot")
        for window in windows:
            self.seen.append((one.name, window.name))
            self.time += 10
            loss = LOSSES[base] / (2 if "sinks 4" in one.name else 1)
            extra = {"steps": loss, "step": 0.1} if stepwise else {}
            yield Marks(loss, 2 * loss, 0.5, self.held.get(base, 0.2), 1.0, **extra)


def race(path: Path, oracle: Any, names: list[str], minutes: float = 60, without: frozenset[str] = frozenset()) -> Race:
    record = Record.open(path, {"text": "a"})
    clock = Clock(minutes, now=lambda: oracle.time)
    clock.before = record.spent
    windows = windows_of(range(3000), 256)
    start = bases("h2o", 0.2, names, set(without))
    return Race(oracle, windows, start, 0.2, set(without), "both", record, clock, lambda *_: None, 0.2)


def windows_seen(oracle: Oracle, name: str, kind: str) -> int:
    return len([1 for one, window in oracle.seen if one == name and window.startswith(kind)])


def test_bad_ones_stop_after_two_windows_and_good_ones_of_each_kind_see_all(tmp_path: Path):
    oracle = Oracle()
    run = race(tmp_path / "r.json", oracle, NAMES, without=frozenset({"settings"}))
    run.run()
    whole = len(run.windows.search)
    assert whole > 4
    stopped = {"tova": 2, "keydiff": 4}
    assert {name: windows_seen(oracle, name, "search") for name in NAMES} == dict.fromkeys(NAMES, whole) | stopped
    assert [one.name for one in run.leaders()] == ["turbo", "snapkv", "kvzip"]
    finals = run.finals()
    assert [one.name for one in finals] == ["turbo", "snapkv", "kvzip", "h2o"]
    assert {one for one, window in oracle.seen if window.startswith("held-out")} == {"turbo", "snapkv", "kvzip", "h2o"}
    assert run.winner(finals)[0].name == "turbo"


def test_what_holds_too_much_or_fails_cannot_win(tmp_path: Path):
    oracle = Oracle({"turbo": 0.3})
    run = race(tmp_path / "r.json", oracle, [*NAMES, "vatp"], without=frozenset({"settings"}))
    run.run()
    assert windows_seen(oracle, "turbo", "search") == 1
    assert [one.name for one in run.leaders()] == ["snapkv", "kvzip"]
    assert [row.error for row in run.record.rows.values() if row.error] == ["it cannot"]


def test_settings_are_laid_over_the_best_and_over_each_other(tmp_path: Path):
    oracle = Oracle()
    run = race(tmp_path / "r.json", oracle, ["snapkv", "tova"], minutes=500, without=frozenset({"codes"}))
    run.run()
    best = run.leaders()[0]
    assert best.name == "snapkv + sinks 4"
    assert best.policy.protect.sinks == 4
    assert any(name.startswith("snapkv + sinks 4 + ") for name, _ in oracle.seen)
    assert not any(name.startswith("tova + ") for name, _ in oracle.seen)


def test_it_ends_in_time_with_the_report(tmp_path: Path):
    oracle = Oracle()
    run = race(tmp_path / "r.json", oracle, NAMES, minutes=8)
    run.run()
    run.finals()
    assert 60 * 6 <= oracle.time <= 60 * 8
    assert windows_seen(oracle, "h2o", "held-out") == len(run.windows.held_out)


def test_a_run_that_was_cut_off_goes_on_where_it_was(tmp_path: Path):
    first, second, straight = Oracle(), Oracle(), Oracle()
    names, settings = NAMES, frozenset({"settings"})
    broken = race(tmp_path / "r.json", first, names, without=settings)
    for one in broken.start[:3]:
        broken._try(one)
    again = race(tmp_path / "r.json", second, names, without=settings)
    again.run()
    assert not {name for name, _ in second.seen} & {one.name for one in broken.start[:3]}
    assert again.clock.spent == pytest.approx(first.time + second.time)
    whole = race(tmp_path / "s.json", straight, names, without=settings)
    whole.run()
    assert [one.name for one in again.leaders()] == [one.name for one in whole.leaders()]


def test_a_winner_that_the_held_out_text_does_not_confirm_gives_way_to_the_default(tmp_path: Path):
    run = race(tmp_path / "r.json", Oracle(), ["snapkv"], without=frozenset({"settings"}))
    run.run()
    finals = run.finals()
    row = run.record.rows[finals[0].key]
    row.held_out = [{**mark, "text": 9.0} for mark in row.held_out]
    best, verdict = run.winner(finals)
    assert best.name == "h2o"
    assert "chosen was snapkv" in verdict


def test_records_of_another_search_are_refused(tmp_path: Path):
    Record(tmp_path / "r.json", {"text": "a"}).save()
    with pytest.raises(PolicyError, match="of another search: other text"):
        Record.open(tmp_path / "r.json", {"text": "b"})
    assert Record.open(tmp_path / "r.json", {"text": "b"}, fresh=True).rows == {}
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(PolicyError, match="no record of a search"):
        Record.open(tmp_path / "r.json", {"text": "a"})


def test_losses_are_of_what_was_asked():
    marks = [{"text": 1.0, "copy": 3.0}, {"text": 0.5, "copy": 0.5}]
    assert losses(marks, "both") == [2.0, 0.5]
    assert losses(marks, "copy") == [3.0, 0.5]


def test_candidates_need_no_weights_and_no_marks_and_hold_equal_bytes():
    found = {one.name: one for one in bases("h2o", 0.2, [], set())}
    assert next(iter(found)) == "h2o"
    assert not {"full", "random", "judge_q", "trim_kv", "duo_attention", "fair", "whitelist"} & {*found}
    assert {"kvzip", "turbo", "tova", "streaming_llm"} <= {*found}
    assert found["snapkv_int4"].policy.asked == "20% bytes"
    assert found["snapkv"].policy.asked == 0.2
    assert found["turbo"].policy.keeps_all
    kinds = {one.kind for one in bases("h2o", 0.2, [], {"codes", "replay"})}
    assert kinds == {"one-pass"}


def test_settings_that_a_policy_cannot_have_are_left_out():
    base = candidate("tova", {"extends": "tova"}, 0.2)
    names = [one.name for one in moves(base, 0.2, set())]
    assert "tova + sinks 4" in names
    assert "tova + safeguard 0.5" not in names
    assert all(one.key != base.key for one in moves(base, 0.2, set()))
    assert not [one for one in moves(base, 0.2, {"codes"}) if one.kind == "codes"]
