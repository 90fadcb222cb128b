"""A graph break between what writes a cache and what attends over it: said by name, under `strict=True`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from kvpass.errors import DeclinedError
from kvpass.runtime.active import Ledger
from kvpass.runtime.breaks import MEND, told
from kvpass.sites.parted import attended, written


def check_parted(graph: fx.Graph, inputs: Sequence[Any], patterns: Any, call: Ledger) -> None:
    """Compare a graph without a site with those that ran before it in the same call. As many tokens as attend were
    written: else they are another sequence's.

    Raises:
        DeclinedError: it attends over a buffer that one of those wrote the new tokens into.
    """
    for half in attended(graph, patterns):
        home = _memory(inputs[half.place])
        source = next((line for memory, n, line in call.parted if memory == home and n == half.tokens), None)
        if source is not None:
            raise DeclinedError(
                "new keys are written into a buffer in one graph, and attended to in another: neither shows a cache",
                where=f"written at {source}; attended to at {half.source}; {told(call.breaks) or 'a graph break'}",
                hint=f"{MEND}; or pass strict=False to leave such caches dense",
            )
    call.parted += [(_memory(inputs[half.place]), half.tokens, half.source) for half in written(graph, patterns)]


def _memory(value: Any) -> int:
    """What tells one memory from another while a call runs."""
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else 0
