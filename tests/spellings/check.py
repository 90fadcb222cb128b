"""One draw: the spelled decoder against the oracle, unmodified, at full budget and evicting; or declined, truly."""

from __future__ import annotations

import re
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from models import traced
from spellings.decoder import DIM, VOCABULARY, Decoder, kv_heads, make
from spellings.predicted import GRAPH_BREAK, predicted
from spellings.reference import Reference
from spellings.spelling import Spelling

import kvpass
from kvpass.errors import DeclinedError, NothingRewritten, Reason

BATCH, BUDGET, LONGEST = 2, 10, 28
CONVERSATIONS = ((14, 1, 1, 1), (17, 1, 1))
"""Tokens of each call."""
GRAPHS = 4
"""For all calls but a prompt of another length, which may have one of its own."""
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}
REFUSED = ("declined", "declined late", "declined untruly")
POLICIES = ("h2o", "streaming_llm")


@dataclass
class Outcome:
    """What became of a draw.

    Attributes:
        kind: `matched`, `declined`, or what is wrong.
        reason: a decline's code; else the first words of what was raised.
        text: all of it.
    """

    kind: str
    reason: str = ""
    text: str = ""
    graphs: int = 0
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.kind not in ("matched", "declined")

    def record(self) -> dict[str, Any]:
        return asdict(self)


class Wrong(Exception):
    """A check that failed: its kind, and what was found."""


def check(spelling: Spelling, policy: str = "h2o", shared: bool = False) -> Outcome:
    """Never raises for what kvpass does; an AssertionError says that the grammar's own decoder is wrong.

    Args:
        shared: both budgets share what Dynamo traced (tests/models/traced.py), where they can: half of the time.
    """
    start = time.monotonic()
    by_itself(make(spelling))
    outcome = _outcome(spelling, policy, shared)
    if shared and "without one_trace" in outcome.text:
        outcome = _outcome(spelling, policy, False)
    outcome.seconds = time.monotonic() - start
    return outcome


def _outcome(spelling: Spelling, policy: str, shared: bool) -> Outcome:
    torch._dynamo.reset()
    traces = mock.patch("kvpass.model.compilation.isolated", traced.isolated) if shared else nullcontext()
    with warnings.catch_warnings(), traces:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", NothingRewritten)
        return _compiled(spelling, policy)


def _compiled(spelling: Spelling, policy: str) -> Outcome:
    model = make(spelling)  # not the one that has run: it has left its state in its attributes
    try:
        graphs = evicting(model, policy)
        identity(model)
    except Wrong as wrong:
        if wrong.args[0] not in REFUSED:
            return Outcome(*wrong.args)
        return without_strict(spelling, policy, wrong.args[1]) or Outcome(*wrong.args)
    if predicted(spelling):
        return Outcome("a predicted decline did not happen", text=str(predicted(spelling)))
    return Outcome("matched", graphs=graphs)


def without_strict(spelling: Spelling, policy: str, code: str) -> Outcome | None:
    """What is declined runs all the same under strict=False, dense or evicting; what is wrong with that."""
    compiled = kvpass.compile(make(spelling), policy, BUDGET, inner="eager", strict=False)
    for lengths, room in conversations(spelling):
        cache, start = compiled.init_cache(BATCH, room), 0
        for call, length in enumerate(lengths):
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    _, cache = compiled.step(tokens(length, start), cache, start)
            except Exception as raised:
                first = next(iter(str(raised).splitlines()), "")
                words = f"{code}, call {call + 1}: {type(raised).__name__}: {first[:150]}"
                return Outcome("strict=False raises", words, str(raised))
            start += length
    return None


def conversations(spelling: Spelling) -> list[tuple[tuple[int, ...], int]]:
    """Lengths of calls, and the room of the buffers."""
    first, second = CONVERSATIONS
    if spelling.room == "own":
        return [(first, sum(first) + 3), (second, sum(second) + 5)]
    if spelling.room == "tight":
        return [(first[:1], first[0]), (second, sum(second) + 5)]
    return [(first, LONGEST), (second, LONGEST)]


def tokens(length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def by_itself(model: Decoder) -> None:
    """Without kvpass the decoder is what the oracle takes it for, with a cache and without."""
    for lengths, room in conversations(model.spelling):
        cache, reference, seen, start = model.init_cache(BATCH, room), Reference(model, "full", 1.0), [], 0
        for length in lengths:
            ids = tokens(length, start)
            with torch.no_grad():
                logits, cache = model.step(ids, cache, start)
            expected = reference(ids)
            torch.testing.assert_close(logits.double(), expected, **FLOAT32)
            seen, start = [*seen, ids], start + length
        again = Reference(model, "full", 1.0)(torch.cat(seen, 1))
        torch.testing.assert_close(again[:, -1], expected[:, -1], **FLOAT32)


def identity(model: Decoder) -> None:
    """Full budget: the model's own numbers, in two conversations, with few graphs."""
    talk(model, "full", 1.0)


def evicting(model: Decoder, policy: str) -> int:
    """A small budget: the oracle's positions and numbers, and bytes as the budget says. How many graphs that took."""
    return talk(model, policy, BUDGET)


def talk(model: Decoder, policy: str, budget: int | float, strict: bool = True) -> int:
    compiled = kvpass.compile(model, policy, budget, inner="eager", strict=strict)
    calls = 0
    for lengths, room in conversations(model.spelling):
        cache, reference, start = compiled.init_cache(BATCH, room), Reference(model, policy, budget), 0
        for length in lengths:
            ids = tokens(length, start)
            logits, cache = one_call(compiled, ids, cache, start, calls)
            expected, start, calls = reference(ids), start + length, calls + 1
            near(logits, expected, f"call {calls}")
            holder = compiled if cache is None else cache
            followed(reference, holder, f"call {calls}")
        if budget == BUDGET:
            bytes_as_said(model.spelling, holder, room)
    graphs = len(compiled.kvpass.graphs)
    # Dynamo takes an int that picks one token for a constant: a graph for each place (docs/design/0014)
    if graphs > GRAPHS + 1 and model.spelling.write != "rows":
        raise Wrong("too many graphs", f"{graphs} for {calls} calls", "", graphs)
    return graphs


def one_call(compiled: Any, ids: torch.Tensor, cache: Any, start: int, calls: int) -> tuple[torch.Tensor, Any]:
    try:
        with torch.no_grad():
            result: tuple[torch.Tensor, Any] = compiled.step(ids, cache, start)
            return result
    except NothingRewritten as said:
        raise Wrong("silence", "NothingRewritten", str(said)) from said
    except DeclinedError as declined:
        raise Wrong(*refused(compiled.spelling, str(declined), calls), str(declined)) from declined
    except Exception as raised:
        ours = isinstance(raised, kvpass.KVPassError)
        kind = f"{type(raised).__name__} at call {calls + 1}" if ours else "raw error"
        first = next(iter(str(raised).splitlines()), "")
        raise Wrong(kind, f"{type(raised).__name__}: {first[:150]}", str(raised)) from raised


def refused(spelling: Spelling, text: str, calls: int) -> tuple[str, str]:
    """What a decline is worth, and its code."""
    found = [reason for reason in Reason if re.search(rf"\b{reason}\b", text)]
    code = str(found[0]) if found else GRAPH_BREAK if "Dynamo broke the graph" in text else "no code"
    if code not in predicted(spelling):
        return "declined untruly", code
    return ("declined", code) if calls == 0 else ("declined late", code)


def near(logits: torch.Tensor, expected: torch.Tensor, where: str) -> None:
    try:
        torch.testing.assert_close(logits.double(), expected, **FLOAT32)
    except AssertionError as error:
        raise Wrong("wrong numbers", where, str(error)) from error


def followed(reference: Reference, holder: Any, where: str) -> None:
    """What is kept is what the oracle keeps."""
    try:
        held = [layer.positions for layer in kvpass.inspect(holder).layers]
    except kvpass.KVPassError as error:
        raise Wrong("silence", "no compressed cache", f"{where}: {error}") from error
    try:
        reference.simulator.follow(held)
    except AssertionError as error:
        raise Wrong("wrong positions", where, str(error)) from error


def bytes_as_said(spelling: Spelling, holder: Any, room: int) -> None:
    data = kvpass.report(holder).to_dict()
    token = spelling.layers * 2 * BATCH * kv_heads(spelling) * DIM * 4
    said = (data["slot_bytes"], data["caller_bytes"])
    owned = spelling.origin == "given" and spelling.in_place  # else what the host allocated has been replaced
    expected = ((BUDGET + 1) * token, room * token if owned else 0)
    if said != expected:
        raise Wrong("wrong bytes", f"slots, caller's {said}", f"expected {expected}")
