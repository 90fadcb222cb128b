"""Verdicts, the table of docs/support.md, and what got worse."""

from __future__ import annotations

import datetime
import json
import platform
from typing import Any

from overrides import OUT_OF_SCOPE

Result = dict[str, Any]
BY_CHOICE = ("SLIDING_WINDOW", "CROSS_ATTENTION", "INDEXER")  # left dense on purpose
VERDICTS = ("matched", "identity", "eviction", "bytes", "masks", "graphs")
NOISE = ("seconds", "done", "graphs_so_far")


def runs(result: Result) -> bool:
    """The unmodified model runs with a KV cache and has a layer of full attention."""
    return result.get("layers", {}).get("full", 0) > 0 and result["status"] in ("ran", "cut off")


def in_scope(results: Result) -> bool:
    return any(runs(results[attention]) for attention in ("sdpa", "eager"))


def matched(result: Result) -> bool:
    """Every layer of full attention is matched, in the prefill and in the decode graphs, and nothing else failed."""
    phases = [result.get("prefill"), result.get("decode")]
    return all(p and p["matched"] >= result["layers"]["full"] and not failing(p) for p in phases)


def failing(phase: Result) -> dict[str, int]:
    """Declined sites by reason, without those that are dense by choice."""
    return {reason: n for reason, n in phase["declined"].items() if reason not in BY_CHOICE}


def verdict(result: Result, name: str) -> bool:
    """True if this part is right; an eviction that never happened is not."""
    if not runs(result):
        return False
    given = result.get(name, {})
    return matched(result) if name == "matched" else bool(given.get("ok") or given.get("skipped"))


def passes(result: Result) -> bool:
    return all(verdict(result, name) for name in VERDICTS)


def whole(results: Result) -> bool:
    """All is right with each attention implementation that the family has."""
    return in_scope(results) and all(passes(r) for r in offered(results)) and not wrong_in_other_shape(results)


def wrong_in_other_shape(results: Result) -> str:
    """What is wrong in a family's second shape, in a line; "" where it has none, or none was tried."""
    result = results.get("other shape", {"status": "not tried"})
    if not runs(result):
        return ""
    failed = [name for name in VERDICTS[1:] if result.get(name, {}).get("ok") is False]
    return reason(result) if failed or not matched(result) else ""


def offered(results: Result) -> list[Result]:
    return [results[a] for a in ("sdpa", "eager") if results[a]["status"] != "no_sdpa"]


def regressions(before: Result, now: Result) -> list[str]:
    """What was right before and is not now."""
    worse = []
    for family in sorted(set(before) & set(now)):
        for attention in ("sdpa", "eager"):
            old, new = before[family][attention], now[family][attention]
            lost = [name for name in VERDICTS if verdict(old, name) and not verdict(new, name)]
            if lost:
                worse.append(f"  {family} {attention}: {', '.join(lost)}; {reason(new)}")
        wrong = wrong_in_other_shape(now[family])
        if wrong and not wrong_in_other_shape(before[family]):
            worse.append(f"  {family} in its other shape: {wrong}")
    return worse


def reason(result: Result) -> str:
    """The first thing that is wrong, in a line."""
    if result.get("why"):
        return str(result["why"])
    wrong = [str(result[name]["why"]) for name in VERDICTS[1:] if result.get(name, {}).get("ok") is False]
    return wrong[0] if wrong else sites(result) if runs(result) and not matched(result) else ""


def sites(result: Result) -> str:
    """`2/0`: sites matched and declined in the prefill, with the reasons; the decode graphs where they differ."""
    prefill, decode = (counted(result.get(name)) for name in ("prefill", "decode"))
    return prefill if prefill == decode else f"{prefill}; decode {decode}"


def counted(phase: Result | None) -> str:
    if phase is None:
        return "-"
    codes = [reason if n == 1 else f"{n} {reason}" for reason, n in phase["declined"].items()]
    return f"{phase['matched']} / {sum(phase['declined'].values())}" + (f" ({', '.join(codes)})" if codes else "")


def word(result: Result, name: str) -> str:
    """A cell of the table."""
    if result["status"] == "no_sdpa":
        return ""
    if not runs(result):
        return "-"
    if result.get(name, {}).get("skipped"):
        return ""
    ok = result.get(name, {}).get("ok")
    return "ok" if ok else "-" if ok is None else "**no**"


def line(family: str, results: Result) -> str:
    """Progress, for one family."""
    if not in_scope(results):
        return f"{family}: out of scope: {scope_reason(family, results)}"
    parts = [family]
    for attention in ("sdpa", "eager"):
        result = results[attention]
        if not runs(result):
            parts.append(f"{attention}: {result['status']}")
            continue
        states = [f"{name} {word(result, name)}" for name in VERDICTS[1:]]
        parts.append(f"{attention}: {sites(result)} sites, {', '.join(states)}".replace("**", ""))
        parts += [f"  {why}" for why in [reason(result)] if why and not passes(result)]
    other = wrong_in_other_shape(results) or results.get("other shape", {}).get("status", "not tried")
    parts.append(f"other shape: {other}")
    return "; ".join(parts) + f"; {results.get('seconds', 0):.0f} s"


def scope_reason(family: str, results: Result) -> str:
    known = OUT_OF_SCOPE.get(family)
    eager = results["eager"]
    return known or f"{eager['status'].replace('_', ' ')}: {eager.get('why', '')}"


def document(results: Result, command: str) -> dict[str, str]:
    """The two files of docs/, by name."""
    head = {"date": datetime.date.today().isoformat(), "command": command, **versions()}
    families = {family: clean(result) for family, result in results.items()}
    data = {**head, "summary": summary(results), "families": families}
    return {"support.json": json.dumps(data, indent=1, sort_keys=True) + "\n", "support.md": markdown(head, results)}


def clean(value: Any) -> Any:
    """Without what changes from run to run."""
    return {k: clean(v) for k, v in value.items() if k not in NOISE} if isinstance(value, dict) else value


def versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}


def summary(results: Result) -> dict[str, int]:
    inside = [r for r in results.values() if in_scope(r)]
    both = {name: sum(all(verdict(r, name) for r in offered(rs)) for rs in inside) for name in VERDICTS}
    return {"families": len(results), "in_scope": len(inside), **both, "all": sum(map(whole, inside))}


PAGE = """# Support

Written by `{command}` on {date}: Python {python}, torch {torch}, transformers {transformers}.

Of the {families} causal-LM families of this transformers, {in_scope} run with a KV cache of full attention. Each is a
tiny random model (batch of 2, 90 tokens, left padded, 8 decode steps, float32, inner compiler `eager`), tried with
`sdpa` and with `eager` attention where the family has both. Of these {in_scope}:

* every full-attention site matched: {matched}
* a full budget gives the model's own tokens and logits: {identity}
* at 25 % (h2o) every layer, row and head keeps what a naive oracle keeps: {eviction}
* bytes held as the budget says: {bytes}
* no graph break added: {graphs}
* masks proved, so that nothing of queries times keys is made in a prompt, a step or a second turn: {proved}
* all of these: **{all}**

Sites are matched / declined (reasons), for the prefill, and for decode where it differs. Sliding windows and
cross-attention are dense by choice. Cells with two words: sdpa, eager; with `--quick` eviction and bytes are tried with
eager attention only, and graph breaks are not counted; `--graphs` counts them, with sdpa where a family has it, else
with eager attention.

`mask` is what the mask of a prompt was taken for ([patterns.md](patterns.md)), with sdpa where a family has it, else
with eager attention; `reads` if some of it stays a tensor, in the phases that are named.

| family | sdpa | eager | identity | eviction = oracle | bytes | mask | note |
| --- | --- | --- | --- | --- | --- | --- | --- |
{inside}

## Out of scope

| family | why |
| --- | --- |
{outside}
"""


def with_host_styles(text: str, before: str) -> str:
    """The page with the block that `make spellings ARGS=--styles` put into the one before."""
    first, last, place = "<!-- made by tests/spellings/host_styles.py -->", "<!-- end -->", "## Out of scope\n"
    if first not in before or place not in text:
        return text
    block = before[before.index(first) : before.index(last, before.index(first)) + len(last)]
    return text.replace(place, f"{block}\n\n{place}", 1)


def markdown(head: dict[str, str], results: Result) -> str:
    s = summary(results)
    share = {name: f"{s[name]} ({100 * s[name] / max(s['in_scope'], 1):.0f} %)" for name in (*VERDICTS, "all")}
    of_all = [[r for r in offered(of) if runs(r)] for of in results.values() if in_scope(of)]
    tried = [of for of in of_all if not all(r.get("graphs", {}).get("skipped") for r in of)]
    if len(tried) < len(of_all):
        good = sum(all(verdict(r, "graphs") for r in of) for of in tried)
        share["graphs"] = f"{good} of the {len(tried)} where that was counted" if tried else "not tried with --quick"
    looked = [words for of in results.values() if in_scope(of) and (words := mask_words(of))]
    good = sum("reads" not in words for words in looked)
    share["proved"] = f"{good} of {len(looked)} ({100 * good / max(len(looked), 1):.0f} %)"
    inside = [row(family, of) for family, of in results.items() if in_scope(of)]
    outside = [f"| {family} | {cell(scope_reason(family, of))} |" for family, of in results.items() if not in_scope(of)]
    return PAGE.format(**head, **{**s, **share}, inside="\n".join(inside), outside="\n".join(outside))


def row(family: str, results: Result) -> str:
    by_attention = [results["sdpa"], results["eager"]]
    where = ["no sdpa" if r["status"] == "no_sdpa" else sites(r) if runs(r) else r["status"] for r in by_attention]
    words = [[word(r, name) for r in by_attention] for name in ("identity", "eviction", "bytes")]
    cells = [" ".join(filter(None, pair)) for pair in words]
    cells += [mask_words(results), cell(note(results))]
    return f"| {family} | {' | '.join(where)} | {' | '.join(cells)} |"


def mask_words(results: Result) -> str:
    """What masks were taken for in a prompt; `reads (decode)` where some of a phase's masks stay tensors."""
    for attention in ("sdpa", "eager"):
        by_phase = results[attention].get("masks", {}).get("said")
        if by_phase:
            reads = [phase for phase, said in by_phase.items() if any("reads a mask" in words for words in said)]
            words = [one.split(", and reads")[0] for one in by_phase.get("prefill", [])]
            return "; ".join([*dict.fromkeys(words), *([f"reads ({', '.join(reads)})"] if reads else [])])
    return ""


def note(results: Result) -> str:
    wrong = list(dict.fromkeys(reason(r) for r in offered(results) if not passes(r)))
    wrong = [why for why in wrong if why not in map(sites, offered(results))]  # those stand in their own columns
    wrong += list(dict.fromkeys(r["torch_compile"] for r in offered(results) if "torch_compile" in r))
    if not all(r.get("padded", True) for r in offered(results)):
        wrong.append("tried without padding: the model itself does not ignore it")
    ties = sum(r.get("eviction", {}).get("near_ties", 0) for r in offered(results))
    return "; ".join([w for w in wrong if w] + ([f"{ties} near-ties"] if ties else []))


def cell(text: str) -> str:
    return text.replace("|", "\\|")[:160]
