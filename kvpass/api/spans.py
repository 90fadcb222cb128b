"""What is left of ranges of tokens that a caller names: the share of them that is kept, and whether one is gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvpass.api.retention import Retention
from kvpass.errors import CacheError

Span = tuple[int, int] | range
"""Columns [start, stop) of the cache, padding counted."""

Spans = Mapping[str, Span | Sequence[Span | None]]
"""By name, one span for all rows, or one for each of them, None where a row has none."""

HINT = "a span is (start, stop), columns of the ids that the model was given; or a list of those, one for each row"


def span_rows(spans: Spans, found: Retention) -> list[dict[str, Any]]:
    """A row for each span of each sequence.

    Keys:
        span, row, start, stop: as asked.
        tokens: stop - start.
        heads: those of all layers whose positions are known.
        kept: share of its tokens that is kept, over all of these heads.
        gone: tokens that no head of any layer holds.
        lost: whether that is all of them.

    Raises:
        CacheError: a span is none, is empty, or reaches beyond the tokens of its row.
    """
    asked = [(name, row, one) for name, said in spans.items() for row, one in enumerate(_by_row(name, said, found))]
    return [_row(name, row, _checked(name, row, one, found), found) for name, row, one in asked if one is not None]


def _by_row(name: str, said: Any, found: Retention) -> Sequence[Any]:
    if _pair(said) is not None:
        return [said] * found.rows
    if isinstance(said, (str, range)) or not isinstance(said, Sequence) or len(said) != found.rows:
        raise CacheError(f"span {name!r} is {said!r}, of a cache of {found.rows} rows", hint=HINT)
    return said


def _pair(one: Any) -> tuple[int, int] | None:
    """Start and stop of what is a span."""
    if isinstance(one, range):
        return (one.start, one.stop) if one.step == 1 else None
    good = isinstance(one, Sequence) and len(one) == 2 and all(isinstance(end, int) for end in one)
    return (one[0], one[1]) if good else None


def _checked(name: str, row: int, one: Any, found: Retention) -> tuple[int, int]:
    pair = _pair(one)
    if pair is None:
        raise CacheError(f"span {name!r} of row {row} is {one!r}", hint=HINT)
    first, (start, stop) = int(found.first[row]), pair
    if not first <= start < stop <= found.tokens:
        raise CacheError(
            f"span {name!r} of row {row} is {start}..{stop}, but the row's tokens stand at {first}..{found.tokens}",
            hint=HINT,
        )
    return start, stop


def _row(name: str, row: int, span: tuple[int, int], found: Retention) -> dict[str, Any]:
    start, stop = span
    held = found.known[row, :, start:stop]
    gone = int((~held.any(0)).sum())
    size = stop - start
    return {
        "span": name,
        "row": row,
        "start": start,
        "stop": stop,
        "tokens": size,
        "heads": len(held),
        "kept": int(held.sum()) / held.numel(),
        "gone": gone,
        "lost": gone == size,
    }
