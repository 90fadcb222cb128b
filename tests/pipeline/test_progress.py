"""What takes long is told, once and in time; what does not, is not."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import fx

from kvpass.pipeline import progress
from kvpass.pipeline.progress import compiling, durations, fingerprint, remember, tracing


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("KVPASS_PROGRESS", raising=False)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    told = Said()
    monkeypatch.setattr(progress, "say", told)
    return told


class Said:
    """The lines, and a way to wait for the next one."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.event = Event()

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        self.event.set()


def graph(size: int = 3) -> fx.GraphModule:
    gm = fx.symbolic_trace(lambda x: torch.relu(x) + 1)
    for node in gm.graph.nodes:
        node.meta["example_value"] = torch.empty(size)
    return gm


def test_a_short_compilation_is_silent_and_remembered(said: Said) -> None:
    with compiling("graph 1", "inductor", graph()):
        pass
    assert said.lines == []
    assert list(durations()) == [fingerprint("inductor", graph())]


def test_a_long_one_is_told_while_it_lasts(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    with compiling("graph 1 (prefill, 30 layers)", "inductor", graph(), "3 pieces of it for all 32"):
        assert said.event.wait(30)
    first, last = said.lines
    assert first.startswith("compiling graph 1 (prefill, 30 layers) with inductor, 3 pieces of it for all 32 ...")
    assert "KVPASS_PROGRESS=0" in first
    assert last.startswith("compiled graph 1 (prefill, 30 layers) in ")


def test_what_took_long_last_time_is_told_at_once(said: Said) -> None:
    remember(fingerprint("inductor", graph()), 21.4)
    with compiling("graph 1", "inductor", graph()):
        assert said.lines[0].startswith("compiling graph 1 with inductor; it took 21 s last time ...")
    assert len(said.lines) == 2
    assert durations()[fingerprint("inductor", graph())] < 21, "the newest time counts"


def test_a_failure_is_not_called_compiled(said: Said) -> None:
    remember(fingerprint("inductor", graph()), 21.4)
    with pytest.raises(ZeroDivisionError), compiling("graph 1", "inductor", graph()):
        raise ZeroDivisionError
    assert len(said.lines) == 1
    assert durations()[fingerprint("inductor", graph())] == 21.4


def test_silenced_by_a_variable(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPASS_PROGRESS", "0")
    monkeypatch.setattr(progress, "PATIENCE", 0)
    with tracing(), compiling("graph 1", "inductor", graph()):
        pass
    assert said.lines == []


def test_a_broken_file_of_durations_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "kvpass_compile_seconds.json").write_text("[1, 2")
    assert durations() == {}
    remember("x", 3.0)
    assert durations() == {"x": 3.0}


def test_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REMEMBERED", 3)
    for at in range(5):
        remember(f"graph{at}", float(at))
    assert list(durations()) == ["graph2", "graph3", "graph4"]


@pytest.mark.parametrize("other", [("eager", graph()), ("inductor", graph(4))])
def test_fingerprints_differ_by_compiler_and_sizes(other: tuple[str, Any]) -> None:
    assert fingerprint("inductor", graph()) == fingerprint("inductor", graph())
    assert fingerprint(*other) != fingerprint("inductor", graph())


def test_long_tracing_is_told(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.01)

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        assert said.event.wait(30)
        return gm.forward

    torch._dynamo.reset()
    with tracing():
        torch.compile(lambda x: x.relu() + 1, backend=backend)(torch.ones(2))
    assert said.lines == ["tracing the model ..." + progress.HINT]
    said.lines.clear()
    torch._dynamo.reset()
    torch.compile(lambda x: x.relu() + 2, backend="eager")(torch.ones(2))
    assert said.lines == [], "only calls of a compiled model of ours are told of"
