"""What many draws came to: a bar while they run, and tables at the end."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from typing import Any

from spellings.spelling import CHOICES, parse

Record = dict[str, Any]
GOOD = ("matched", "declined")
LEAST = 3
"""Draws of an option before its share of failures is worth a line."""


def bar(records: list[Record], total: int) -> None:
    """One line on stderr, overwritten if that is a terminal; failures stay."""
    last, failed = records[-1], sum(record["kind"] not in GOOD for record in records)
    if last["kind"] not in GOOD:
        print(f"{' ' * 78}\r{last['kind']}: {last['reason'][:120]}: {last['spelling']}", flush=True)
    filled = 30 * len(records) // total
    line = f"[{'#' * filled}{'.' * (30 - filled)}] {len(records)}/{total}, {failed} failed"
    if sys.stderr.isatty():
        print(line, end="\r", file=sys.stderr, flush=True)
    elif len(records) % 25 == 0 or len(records) == total:
        print(line, file=sys.stderr, flush=True)


def table(records: list[Record]) -> str:
    """Matched, declined by reason, failures by kind and by choice."""
    kinds = Counter(record["kind"] for record in records)
    seconds = sum(record["seconds"] for record in records) / max(1, len(records))
    lines = [f"\n{len(records)} draws, {seconds:.2f} s each"]
    lines += [f"  {count:5} {100 * count / len(records):5.1f} %  {kind}" for kind, count in kinds.most_common()]
    for kind in kinds:
        reasons = Counter(record["reason"] for record in records if record["kind"] == kind)
        if kind != "matched":
            lines += [f"{kind}:"] + [f"  {count:5}  {reason[:150]}" for reason, count in reasons.most_common(12)]
    return "\n".join(lines + by_choice(records))


def by_choice(records: list[Record]) -> list[str]:
    """Options that fail more often than all do, the worst first."""
    tried: dict[tuple[str, Any], list[bool]] = defaultdict(list)
    for record in records:
        spelling = parse(record["spelling"])
        for field in CHOICES:
            tried[field, getattr(spelling, field)].append(record["kind"] not in GOOD)
    share = sum(record["kind"] not in GOOD for record in records) / max(1, len(records))
    worse = [
        (sum(failed) / len(failed), len(failed), field, option)
        for (field, option), failed in tried.items()
        if len(failed) >= LEAST and sum(failed) / len(failed) > share
    ]
    if not worse:
        return []
    lines = [f"failures by choice ({100 * share:.0f} % of all draws failed):"]
    worse.sort(key=lambda one: one[0], reverse=True)
    return lines + [f"  {100 * s:5.1f} % of {n:4}  {field}={option!r}" for s, n, field, option in worse]
