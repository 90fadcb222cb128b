"""The table of host styles in docs/support.md: python -P tests/spellings/run.py --styles

Each style of tests/models/styles is compiled at full budget and at 24 slots (h2o), fed a prompt, tokens one by one, and
a second prompt, and compared with the unmodified model and with the oracle.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from models.plain import tokens
from models.styles.kinds import WORDS
from models.styles.oracle import Oracle
from models.styles.style import DIM, LAYERS, Style, make

import kvpass
from kvpass.errors import Reason

PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"
FIRST, LAST = "<!-- made by tests/spellings/host_styles.py -->", "<!-- end -->"
BATCH, PROMPTS, STEPS, BUDGET, ROOM = 2, (50, 33), 4, 24, 128
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}
HEAD = """## Host styles beyond transformers

Written by `make spellings ARGS=--styles`: decoders as their authors write them (`tests/models/styles`), two layers, a
batch of 2, two prompts with tokens one by one, inner compiler `eager`. Identity: the model's own numbers at full
budget. Eviction: at 24 slots (h2o) the slots and numbers of a naive oracle, and bytes as the budget says. Graphs: of
all those calls, the second prompt's own included.

| style | attentions | identity | eviction = oracle | graphs |
| --- | --- | --- | --- | --- |
"""


def calls(prompt: int) -> list[int]:
    return [prompt] + [1] * STEPS


def row(kind: type[Style]) -> str:
    """One style's line."""
    torch._dynamo.reset()
    model = make(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same, _ = verdict(identity, model)
        evicts, graphs = verdict(eviction, model)
    sites = graphs if isinstance(graphs, str) else "matched"
    count = graphs if isinstance(graphs, int) else "-"
    return f"| {WORDS[kind].replace('|', '&#124;')} | {sites} | {same} | {evicts} | {count} |"


def verdict(check: Any, model: Any) -> tuple[str, int | str]:
    """Its word, and how many graphs that took, or why there is nothing to count."""
    try:
        return "ok", check(model)
    except kvpass.KVPassError as error:
        codes = [str(reason) for reason in Reason if str(reason) in str(error)]
        said = f"declined ({codes[0]})" if codes else f"{type(error).__name__}: {error.what[:80]}"
        return "-", said
    except AssertionError as error:
        return "WRONG", f"WRONG: {str(error).strip().splitlines()[0][:80]}"


def identity(model: Any) -> int:
    compiled = kvpass.compile(model, "h2o", 1.0, inner="eager")
    for prompt in PROMPTS:
        plain = copy.deepcopy(model)
        caches, start = (plain.init_cache(BATCH, ROOM), compiled.init_cache(BATCH, ROOM)), 0
        for length in calls(prompt):
            ids = tokens(BATCH, length, seed=start)
            with torch.no_grad():
                expected, theirs = plain.step(ids, caches[0], start)
                logits, ours = compiled.step(ids, caches[1], start)
            torch.testing.assert_close(logits, expected, **FLOAT32)
            caches, start = (theirs, ours), start + length
    return len(compiled.kvpass.graphs)


def eviction(model: Any) -> int:
    compiled = kvpass.compile(model, "h2o", BUDGET, inner="eager")
    for prompt in PROMPTS:
        oracle, cache, start = Oracle(model, "h2o", BUDGET), compiled.init_cache(BATCH, ROOM), 0
        for length in calls(prompt):
            ids = tokens(BATCH, length, seed=start)
            with torch.no_grad():
                logits, cache = compiled.step(ids, cache, start)
            expected, start = oracle(ids), start + length
            oracle.simulator.follow([layer.positions for layer in kvpass.inspect(cache).layers])
            torch.testing.assert_close(logits[:, -1], expected, **FLOAT32)
        slots = LAYERS * 2 * BATCH * model.attentions()[0].kv_heads * (BUDGET + 1) * DIM * 4
        assert kvpass.report(cache).to_dict()["slot_bytes"] == slots, "bytes are not the budget's"
    return len(compiled.kvpass.graphs)


def block() -> str:
    """All styles' lines, between the marks."""
    lines = []
    for kind in WORDS:
        lines.append(row(kind))
        print(lines[-1], flush=True)
    matched = sum("| matched | ok | ok |" in line for line in lines)
    return (
        f"{FIRST}\n{HEAD}"
        + "\n".join(lines)
        + f"\n\nMatched, the same and evicting: {matched} of {len(lines)}.\n{LAST}\n"
    )


def write() -> bool:
    """Put the block into docs/support.md, in place of the one there, else in front of what is out of scope."""
    text = PAGE.read_text()
    made, old = block(), found(text)
    place = "## Out of scope\n"
    PAGE.write_text(text.replace(old, made) if old else text.replace(place, f"{made}\n{place}"))
    return "WRONG" in made


def found(text: str) -> str:
    """The block in a page; "" if there is none."""
    if FIRST not in text:
        return ""
    return text[text.index(FIRST) : text.index(LAST, text.index(FIRST)) + len(LAST)] + "\n"
