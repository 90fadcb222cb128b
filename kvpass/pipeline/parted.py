"""A graph break between what writes a cache and what attends over it: said by name, under `strict=True`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from kvpass.errors import DeclinedError
from kvpass.runtime.active import Ledger
from kvpass.runtime.breaks import MEND, told
from kvpass.runtime.memory import storage_key
from kvpass.sites.parted import attended, written


def check_parted(graph: fx.Graph, inputs: Sequence[Any], patterns: Any, call: Ledger) -> list[tuple[int, int, str]]:
    """Compare a graph without a site with those that ran before it in the same call. As many tokens as attend were
    written: else they are another sequence's. Returns what it writes into tensors of its own: their places among its
    results, how many tokens, the model's line.

    Raises:
        DeclinedError: it attends over a buffer that one of those wrote the new tokens into.
    """
    for half in attended(graph, patterns):
        home = storage_key(inputs[half.place])
        source = next((line for known, n, line in call.parted if known == home and n == half.tokens), None)
        if source is not None:
            raise DeclinedError(
                "new keys are written into a buffer in one graph, and attended to in another: neither shows a cache",
                where=f"written at {source}; attended to at {half.source}; {told(call.breaks) or 'a graph break'}",
                hint=f"{MEND}; or pass strict=False to leave such caches dense",
            )
    halves = written(graph, patterns)
    placed = [half for half in halves if half.result is None]
    call.parted += [(storage_key(inputs[half.place]), half.tokens, half.source) for half in placed]
    return [(half.result, half.tokens, half.source) for half in halves if half.result is not None]
