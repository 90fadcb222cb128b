"""Steps around a compiled call: the plan puts them there, `Bound` runs them and names no feature."""

from __future__ import annotations

import ast
import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpass.kernels.budget import budget
from kvpass.kernels.errors import DataError
from models import plain
from models.graphs import table

import kvpass
from kvpass.errors import CacheError, StaleCacheError
from kvpass.lowering import lower
from kvpass.plan.plan import plan
from kvpass.policy.policy import Policy
from kvpass.runtime import bind, steps
from kvpass.runtime.shell import find
from kvpass.runtime.step import CallFacts, Moment, SharedInput, Step
from kvpass.terms import CacheForm, Phase

LAYERS = {"name": "mine", "extends": "h2o", "layers": {"1": {"budget": 12}}}
"""Layer 1 keeps 12 slots, layer 0 what the caller says."""


def identifiers(module: Any) -> set[str]:
    """What a module's code names: attributes, variables, keywords, texts."""
    nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
    found = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    found |= {n.id for n in nodes if isinstance(n, ast.Name)} | {n.arg for n in nodes if isinstance(n, ast.keyword)}
    return found | {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def imports(module: Any) -> set[str]:
    nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
    found = {f"{n.module}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}
    return found | {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}


def features() -> set[str]:
    """Modules that steps and inputs are in, and those of ours that these import and the seam does not."""
    kinds = [type(one) for one in (*steps.STEPS, *steps.INPUTS)]
    homes = {kind.__module__ for kind in kinds}
    below = {name.rpartition(".")[0] for kind in kinds for name in imports(inspect.getmodule(kind))}
    seam = {"kvpass.runtime.step", "kvpass.runtime.store", "kvpass.kernels.rule", "kvpass.terms"}
    return homes | {name for name in below if name.startswith("kvpass.")} - seam - {"kvpass.kernels.errors"}


@pytest.mark.parametrize("module", [bind, lower], ids=lambda module: module.__name__)
def test_no_step_or_input_is_named(module: Any) -> None:
    named = identifiers(module)
    assert not named & {one.name for one in (*steps.STEPS, *steps.INPUTS)}
    assert not named & {type(one).__name__ for one in (*steps.STEPS, *steps.INPUTS)}


def test_bound_names_no_feature() -> None:
    """It reads no rule and imports no module that a step is made of."""
    assert "rule" not in identifiers(bind)
    assert {"kvpass.runtime.marks", "kvpass.runtime.steps.turn_keys"} <= features()
    assert not {name for name in imports(bind) for feature in features() if (name + ".").startswith(feature + ".")}
    assert not {name for name in imports(bind) if name.startswith("kvpass.runtime.steps")}


def always(names: list[str]) -> dict[Phase, list[str]]:
    return dict.fromkeys(Phase, names)


PLANNED: dict[str, tuple[Any, dict[Phase, list[str]]]] = {
    "h2o": ("h2o", always([])),
    "between calls": (
        {"name": "mine", "extends": "h2o", "when": "calls"},
        {Phase.PREFILL: ["free_slots"], Phase.EXTEND: ["free_slots"], Phase.DECODE: []},
    ),
    "on the first call": ({"name": "mine", "extends": "h2o", "when": "first"}, always([])),
    "waiting": ({"name": "mine", "extends": "h2o", "every": 4}, always(["evict_waiting"])),
    "turned": ("streaming_llm_reindexed", always(["turn_keys"])),
    "shared by data": (
        "corm",
        {Phase.PREFILL: ["share_slots"], Phase.EXTEND: ["share_slots"], Phase.DECODE: []},
    ),
    "all of them": (
        {"name": "mine", "extends": "corm", "when": "calls", "positions": "reindexed"},
        {
            Phase.PREFILL: ["share_slots", "free_slots", "turn_keys"],
            Phase.EXTEND: ["share_slots", "free_slots", "turn_keys"],
            Phase.DECODE: ["turn_keys"],
        },
    ),
}


@pytest.mark.parametrize("name", PLANNED)
def test_what_a_policy_asks_for(name: str) -> None:
    from kvpass.plan.rule import rule_of

    policy, wanted = PLANNED[name]
    rule = rule_of(Policy.load(policy).with_budget(0.2), 0, 2)
    for phase, names in wanted.items():
        assert [one.name for one in steps.STEPS if one.applies(rule, phase)] == ["check_marks", *names]


class MadeUp(Step):
    """Notes what it is handed."""

    about = "notes <what> it is handed"

    def __init__(self, name: str, moment: Moment, error: Exception | None = None) -> None:
        self.name, self.moment, self.error = name, moment, error
        self.seen: list[tuple[str, Phase, int, tuple[str, ...], list[int], list[int]]] = []
        self.stores: list[Any] = []

    def applies(self, rule: Any, phase: Phase) -> bool:
        return budget(rule, 1000) == 12

    def run(self, call: CallFacts) -> None:
        cursors = [int(store.state.cursor[0, 0, 2]) for store in call.stores]
        names = tuple(b.name for b in call.bindings)
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled() or self.moment is Moment.CHECK
        self.seen.append((self.name, call.phase, call.new, names, [s.tokens for s in call.stores], cursors))
        self.stores += call.stores
        if self.error is not None:
            raise self.error


class Asked(SharedInput):
    """An input that no op reads: how many calls there were."""

    name, axes = "asked", ("B", "S")

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def applies(self, rule: Any, phase: Phase, form: CacheForm) -> bool:
        return phase is Phase.DECODE

    def value(self, call: CallFacts) -> torch.Tensor:
        self.shapes.append((call.bindings[0].sizes["B"](call.args), call.new))
        return torch.zeros(self.shapes[-1], dtype=torch.int32)


def compiled(**options: Any) -> Any:
    return kvpass.compile(plain.make(plain.Decoder), LAYERS, 24, inner="eager", **options)


@torch.no_grad()
def call(model: Any, cache: Any = None, tokens: int = 1) -> Any:
    return model(plain.tokens(1, tokens), cache)[1]


def test_a_made_up_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It runs in its moment, before and after the compiled call, for its sites only, and every text lists it."""
    made = [MadeUp(moment.name.lower(), moment) for moment in (Moment.AFTER, Moment.BEFORE, Moment.CHECK)]
    monkeypatch.setattr(steps, "STEPS", (*steps.STEPS, *made))
    model = compiled(debug=str(tmp_path))
    with torch.inference_mode():
        cache = call(model, call(model, tokens=40))
    assert find(cache[0][0]).tokens == 41
    after, before, check = made
    first = (Phase.PREFILL, 40, ("blocks.1",))
    second = (Phase.DECODE, 1, ("blocks.1",))
    assert check.seen == [("check", *first, [], []), ("check", *second, [], [])]
    # the cursor counts the tokens seen by the ops; `tokens` what the host believes
    assert before.seen == [("before", *first, [0], [0]), ("before", *second, [40], [40])]
    assert after.seen == [("after", *first, [0], [40]), ("after", *second, [40], [41])]
    assert all(store is find(cache[1][0]) for store in (*before.stores, *after.stores))
    page = (tmp_path / "index.html").read_text()
    for graph in ("graph_001_prefill", "graph_002_decode"):
        text, data = ((tmp_path / graph / f"03_plan.{kind}").read_text() for kind in ("txt", "json"))
        order = ["check_marks", "check", "before", "after"]
        assert [row["step"] for row in json.loads(data)["steps"]] == order
        assert json.loads(data)["steps"][-1] == {
            "step": "after",
            "moment": "after a call",
            "about": "notes <what> it is handed",
            "sites": ["blocks.1"],
        }
        assert "  after a call: after for 1 of the sites  [notes <what> it is handed]" in text.splitlines()
        assert [line.split(": ")[1].split()[0] for line in text.splitlines()[-4:]] == order
    row = "<tr><td>before a call</td><td>before</td><td>notes &lt;what&gt; it is handed</td><td>1 of 2</td></tr>"
    assert page.count(row) == 2


def test_a_made_up_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The graph takes it behind all state, and is given its value in each call."""
    asked = Asked()
    monkeypatch.setattr(steps, "INPUTS", (*steps.INPUTS, asked))
    model = compiled(debug=str(tmp_path), verify=True)
    cache = call(model, tokens=40)
    for _ in range(3):
        cache = call(model, cache)
    assert asked.shapes == [(1, 1)] * 3
    text = (tmp_path / "graph_002_decode" / "04_rewritten.py").read_text()
    assert text.index("kvpass_1_cursor:") < text.index("kvpass_asked:")
    assert json.loads((tmp_path / "graph_002_decode" / "03_plan.json").read_text())["inputs"] == ["asked"]
    assert "kvpass_asked" not in (tmp_path / "graph_001_prefill" / "04_rewritten.py").read_text()


@pytest.mark.parametrize("moment", [Moment.BEFORE, Moment.AFTER])
def test_a_step_that_fails_halfway(monkeypatch: pytest.MonkeyPatch, moment: Moment) -> None:
    """All stores of the call are spoiled, those of other sites too; the error says where and what to do."""
    made = MadeUp("made_up", moment)
    monkeypatch.setattr(steps, "STEPS", (*steps.STEPS, made))
    model = compiled()
    cache = call(model, call(model, tokens=40))
    saved, made.error = copy.deepcopy(cache), DataError("it does not fit", "make it fit")
    with pytest.raises(CacheError, match="it does not fit") as caught:
        call(model, cache)
    assert "one of 2 sites, of which the first is blocks.0" in str(caught.value)
    assert caught.value.hint == "make it fit"
    made.error = None
    with pytest.raises(StaleCacheError, match="failed halfway"):
        call(model, cache)
    assert find(cache[0][0]).spoiled
    call(model, saved)


def test_a_check_that_refuses_leaves_the_caches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = MadeUp("made_up", Moment.CHECK)
    monkeypatch.setattr(steps, "STEPS", (*steps.STEPS, made))
    model = compiled()
    cache = call(model, call(model, tokens=40))
    store = find(cache[1][0])
    before, made.error = (store.used, store.slots, store.tokens), CacheError("not now")
    for _ in range(30):
        with pytest.raises(CacheError, match="not now"):
            call(model, cache)
    assert (store.used, store.slots, store.tokens) == before
    made.error = None
    call(model, cache)


def test_call_facts_of_some_sites() -> None:
    bindings: Any = ("a", "b", "c")  # what stands in their places is handed on, whatever it is
    stores: Any = ("A", "B", "C")
    whole = CallFacts((), bindings, 4, "here", stores, (0, 0, 0))
    assert whole.of((0, 1, 2)) is whole
    assert whole.of((0, 2)).sites == [("a", "A"), ("c", "C")]
    unopened = CallFacts((), bindings, 4, "here")
    assert unopened.of((1,)).bindings == ("b",)
    with pytest.raises(ValueError, match="shorter"):
        _ = unopened.of((1,)).sites


def test_marks_that_are_read_are_said() -> None:
    found = table(plain.make(plain.GroupedDecoder), plain.tokens(1, 40), None)
    made = plan(Policy.load("fair").with_budget(100), found)
    assert str(made).endswith("check_marks  [marks of the caller other than keep, spans, drop are refused]")
    assert made.to_dict()["inputs"] == ["marks"]
