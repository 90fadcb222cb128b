"""From finished cells to tables, a picture and docs/quality.md. Reads nothing but the results' JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quality import picture, stats, versus
from quality.prompts import MODES, TASKS

READ = """How to read it:

- `aware`: the question is the end of the prompt that is compressed. `agnostic`: the prompt is compressed first, the
  question comes in the next call. All that is judged is said after the compression: answers begin in a second call.
- Retrieval: right answers of {trials} trials, with the 95 % Wilson interval in percent. An answer of five digits is
  right if each digit is the most likely token after those before it, which is what greedy decoding would say. Passkey:
  one number in the text. Multi-key: one of three numbers that have names. Variable: x1 is a number, x2 is x1, x3 is x2;
  asked for x2. All three are in the same text, so each distracts from the others.
- `answer NLL`: mean negative log-likelihood of the right digits, agnostic, all tasks; finer than right or wrong.
- Text: {steps} tokens after {trials} real texts, token by token, mean and half of the 95 % t interval over texts. `KL`:
  nats, full cache against policy, along the true text. `same token`: the most likely token is the full cache's, along
  the true text and along the full cache's own greedy text. `perplexity` of the true text. `attention kept`: share of
  the full cache's attention to the prompt (next 16 true tokens, all layers and heads, Hugging Face's eager attention)
  that falls on kept positions.
- `held`: K and V as kvpass.report counts them after the prompt, of the dense cache; positions and statistics apart.
- Rows `kvpress ..`: the same with NVIDIA's library (`examples/quality/peer.py`). It compresses the first call and keeps
  every later token, so that by the end of a text it holds more than `held` says.
- Rows `.. (first call)` and `.. (as kvpress)`: kvpass evicting in the first call alone too (`when: first`), in as many
  bytes as kvpress at every step, so that these can be compared (`run.py --beside-kvpress`).
- All policies see the same texts, numbers and depths. Intervals are of one policy alone: differences between policies
  are paired and less noisy than the intervals look, but with few trials most neighbours cannot be told apart.
- `full` is the ceiling, and its KL is the floor of rounding; `random` is what every policy must beat. A 135M model is
  weak: where `full` itself is below 100 %, the rest of the way is not the policy's fault.
"""


def percent(value: float) -> str:
    return f"{100 * value:.0f}"


def share_cell(found: list[dict[str, Any]]) -> str:
    right = sum(entry["right"] for entry in found)
    _, low, high = stats.wilson(right, len(found))
    return f"{right}/{len(found)} [{percent(low)}-{percent(high)}]"


def spread(values: list[float], digits: int, scale: float = 1.0) -> str:
    middle, low, high = stats.mean([scale * value for value in values])
    return f"{middle:.{digits}f}" if math.isnan(low) else f"{middle:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def held(cell: dict[str, Any]) -> float:
    """K and V held, of the dense cache."""
    return float(cell["held"]["bytes"] / cell["held"]["dense_bytes"])


def accuracy(cell: dict[str, Any], mode: str) -> float:
    """Right answers over all tasks."""
    entries = [entry["right"] for task in TASKS for entry in cell["retrieval"][mode][task]]
    return sum(entries) / len(entries)


def answer_nll(cell: dict[str, Any]) -> list[float]:
    """One value for each trial: the mean over its three questions."""
    by_trial = zip(*(cell["retrieval"]["agnostic"][task] for task in TASKS), strict=True)
    return [sum(entry["nll"] for entry in entries) / len(entries) for entries in by_trial]


def retrieval_row(cell: dict[str, Any]) -> list[str]:
    scores = [share_cell(cell["retrieval"][mode][task]) for task in TASKS for mode in MODES]
    scores += [percent(accuracy(cell, mode)) for mode in MODES]
    return [f"`{cell['policy']}`", f"{100 * held(cell):.1f}", *scores, spread(answer_nll(cell), 2)]


def text_row(cell: dict[str, Any]) -> list[str]:
    text = cell["text"]
    middle, low, high = (math.exp(value) for value in stats.mean(text["nll"]))
    perplexity = f"{middle:.1f}" if math.isnan(low) else f"{middle:.1f} [{low:.1f}-{high:.1f}]"
    return [
        f"`{cell['policy']}`",
        f"{100 * held(cell):.1f}",
        spread(text["kl"], 3 if max(text["kl"]) >= 0.0005 else 6),
        spread(text["agree"], 0, 100),
        spread(text["agree_greedy"], 0, 100),
        perplexity,
        spread(text["mass"], 1, 100) if text["mass"] else "",
    ]


RETRIEVAL_COLUMNS = ["policy", "held %", *(f"{task} {mode}" for task in TASKS for mode in MODES)]
RETRIEVAL_COLUMNS += [*(f"all {mode} %" for mode in MODES), "answer NLL"]
TEXT_COLUMNS = ["policy", "held %", "KL", "same token %, true text", "same token %, own text"]
TEXT_COLUMNS += ["perplexity", "attention kept %"]


def table(columns: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def sections(results: dict[str, Any]) -> list[str]:
    """Two tables for each context and budget: least KL first, between the ceiling and the rest no line is drawn."""
    lines: list[str] = []
    cells = results["cells"]
    groups = sorted({(c["context"], c["budget"]) for c in cells if c["policy"] != "full"})
    groups = groups or sorted({(c["context"], c["budget"]) for c in cells})
    for context, budget in groups:
        mine = [c for c in cells if c["context"] == context and (c["budget"] == budget or c["policy"] == "full")]
        by_kl = sorted(mine, key=lambda c: stats.mean(c["text"]["kl"])[0])
        lines += ["", f"## {context:,} tokens, budget {100 * budget:g} %", "", "Text, least KL first:", ""]
        lines += table(TEXT_COLUMNS, map(text_row, by_kl))
        lines += ["", "Retrieval, same order:", "", *table(RETRIEVAL_COLUMNS, map(retrieval_row, by_kl))]
        both = [versus.row(*pair) for pair in versus.pairs(mine)]
        if both:
            lines += ["", "### Next to kvpress, in the same bytes", "", versus.ABOUT, ""]
            lines += table(versus.COLUMNS, both)
    return lines


def gaps(results: dict[str, Any]) -> list[str]:
    """What was not measured, said plainly."""
    lines = ["", "## Missing", ""]
    by_group: dict[tuple[str, str], list[str]] = {}
    for name in results["missing"]:
        context, budget, policy = name.split("-", 2)
        by_group.setdefault((context, budget), []).append(policy)
    if not by_group and not results["failed"] and not results["weightless"]:
        return [*lines, "Nothing: every policy, budget and context of `--full` is here."]
    total = sum(map(len, by_group.values()))
    lines.append(f"Not measured, of the whole grid (`--full`): {total} cells.")
    lines.append("")
    for (context, budget), policies in by_group.items():
        every = len(policies) == len(results["policies"]) - 1  # `full` stands apart
        who = f"all {len(policies)} evicting policies" if every else ", ".join(policies)
        lines.append(f"- {int(context):,} tokens, {100 * float(budget):g} %: {who}")
    lines += [f"- failed: {name}: {words}" for name, words in results["failed"].items()]
    if results["weightless"]:
        lines.append(f"- {', '.join(results['weightless'])}: read trained weights or tables, and there are none here")
    return lines


def facts(results: dict[str, Any]) -> list[str]:
    machine = results["machine"]
    commits = sorted({cell["commit"] for cell in results["cells"]})
    minutes = sum(cell["seconds"] for cell in results["cells"]) / 60
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers", "kvpass"))
    return [
        "SmolLM2-135M-Instruct, float32, text of Python's documentation, inner compiler `eager`.",
        f"`{results['command']}`, {results['date']}; {len(results['cells'])} cells, {minutes:.0f} process minutes;",
        f"commit {', '.join(commits)}; {versions}; {machine['cpu']}, {machine['threads']} thread(s).",
    ]


def markdown(results: dict[str, Any], title: str, image: str) -> str:
    settings = results["settings"]
    if not results["cells"]:
        lines = [f"# {title}", "", "**No figures yet**: no cell of `make quality` has been finished and rendered."]
        return "\n".join([*lines, "", READ.format(**settings).rstrip(), *gaps(results), ""])
    lines = [f"# {title}", "", *facts(results), "", READ.format(**settings).rstrip(), "", f"![quality]({image})"]
    return "\n".join([*lines, *sections(results), *gaps(results), ""])


def docs_page(results: dict[str, Any], folder: Path, name: str, docs: Path) -> Path:
    """docs/quality.md, generated."""
    link = os.path.relpath(folder / name, docs)
    note = f"<!-- Generated by `make quality` from {link}.json: do not edit. -->\n"
    page = docs / "quality.md"
    page.write_text(note + markdown(results, "Quality", f"{link}.png"))
    return page


def write(results: dict[str, Any], folder: Path, name: str, docs: Path) -> list[Path]:
    """JSON, table, picture, docs page."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{end}" for end in ("json", "md", "png")]
    paths[0].write_text(json.dumps(results, indent=1) + "\n")
    paths[1].write_text(markdown(results, f"kvpass quality, {results['date']}", f"{name}.png"))
    picture.draw(results, paths[2])
    return [*paths, docs_page(results, folder, name, docs)]


def newest(nothing: dict[str, Any], folder: Path, docs: Path) -> list[Path]:
    """Everything again, from the last JSON there is; with none, a page that says so."""
    found = sorted(folder.glob("*.json"))
    if not found:
        page = docs / "quality.md"
        page.write_text("<!-- Generated by `make quality`: do not edit. -->\n" + markdown(nothing, "Quality", ""))
        return [page]
    return write(json.loads(found[-1].read_text()), folder, found[-1].stem, docs)
