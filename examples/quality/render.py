"""From finished cells to tables, a picture and docs/quality.md. Reads nothing but the results' JSON."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from quality import answers, picture, stats, versus
from quality.shown import held, spread, table
from quality.tasks import TASKS

MORE = """
## Which tokens stay
![h2o beside kvzip: layers and heads against positions](retention.png)

A passkey in 1,024 tokens at 20 %, layers and heads against positions ([what it shows](debugging.md)); any cache of
yours: `kvpass.page(cache, tokens)`.

Other pages: the default policy on texts of its own ([design/0022](design/0022-heads-by-reach.md)), prompts that are
read twice ([quality-replay.md](quality-replay.md)), beside kvpress on two models
([quality-kvpress.md](quality-kvpress.md)), quality by bytes ([quality-bytes.md](quality-bytes.md)).
"""

READ = """How to read it:

- `aware`: the question is the end of the prompt that is compressed. `agnostic`: the prompt is compressed first, the
  question comes in the next call. All that is judged is said after the compression: answers begin in a second call.
- Retrieval: right answers of {trials} trials, with the 95 % Wilson interval in percent. An answer is right if each of
  its tokens is the most likely one after those before it, which is what greedy decoding would say; where a task names
  other answers, if it is likelier than each of them, a token. The tasks of this page:
{tasks}
- `all`: over the tasks that the full cache gets half right at least; a task that it fails tells nothing of a policy,
  and is named under the table.
- `gone`: of the answers that stand once in the text, those of which a token is held by no head of any layer
  (`kvpass.report(cache, spans)`): it cannot be read any more, whatever is asked.
- `answer NLL`: mean negative log-likelihood of the right tokens, agnostic, tasks as in `all`; finer than right or
  wrong.
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


TEXT_COLUMNS = ["policy", "held %", "KL", "same token %, true text", "same token %, own text"]
TEXT_COLUMNS += ["perplexity", "attention kept %"]


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
        lines += answers.tables(by_kl)
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


def read(results: dict[str, Any]) -> str:
    """How to read the page, with a line for each task that was asked."""
    tasks = [f"  - {task}: {TASKS[task].tasks[task]}" for task in answers.asked(results["cells"]) or TASKS]
    return READ.format(**{**results["settings"], "tasks": "\n".join(tasks)}).rstrip()


def markdown(results: dict[str, Any], title: str, image: str) -> str:
    if not results["cells"]:
        lines = [f"# {title}", "", "**No figures yet**: no cell of `make quality` has been finished and rendered."]
        return "\n".join([*lines, "", read(results), *gaps(results), ""])
    lines = [f"# {title}", "", *facts(results), "", read(results), "", f"![quality]({image})"]
    return "\n".join([*lines, *sections(results), *gaps(results), ""])


def docs_page(results: dict[str, Any], folder: Path, name: str, docs: Path) -> Path:
    """docs/quality.md, generated."""
    link = os.path.relpath(folder / name, docs)
    note = f"<!-- Generated by `make quality` from {link}.json: do not edit. -->\n"
    page = docs / "quality.md"
    page.write_text(note + markdown(results, "Quality", f"{link}.png") + MORE)
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
