"""What a page shows of a cache, as plain data: the page's own script reads it, and so may any other program."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import torch

from kvpass import __version__
from kvpass.api.report import report
from kvpass.api.retention import Layer, Retention, retention
from kvpass.api.spans import Spans
from kvpass.errors import CacheError
from kvpass.plan.words import in_words

BITS = torch.tensor([1 << bit for bit in range(8)])


def page_data(cache: Any, texts: Sequence[Sequence[str]] | None, spans: Spans | None) -> dict[str, Any]:
    """JSON of a cache.

    Keys:
        buffers: whether an unmodified cache of it has room for all tokens from the start.
        version, tokens (columns T), rows (sequences B), first (columns in front of each row's first token).
        report: `kvpass.report(cache, spans).to_dict()`; text: the same in words.
        rules: [which layers, sentences] for each kind of rule.
        layers: of each one `name`, `number`, `heads` (0: its positions are not known), `bytes`, `slots`, `dense_bytes`,
            `note` (of a dense one).
        bitmaps: base64, each other one once; position p is bit p % 8, lowest first, of byte p // 8.
        held: for each row and layer, a number of `bitmaps` for each head. whole: likewise, what is not codes alone;
            null where the layer has no codes.
        live: for each row and layer, positions held by each head.
        texts: of each row's tokens, from column 0 on; null if none were given.

    Raises:
        CacheError: as of `report` and `inspect`; texts of another number of rows.
    """
    found, bitmaps = retention(cache), _Bitmaps()
    if texts is not None and len(texts) != found.rows:
        raise CacheError(
            f"tokens of {len(texts)} sequences, for a cache of {found.rows}",
            hint="give the ids that the model was given, [rows, T], or a list of strings for each row",
        )
    told = report(cache, spans)
    return {
        "version": __version__,
        "tokens": found.tokens,
        "rows": found.rows,
        "first": found.first.tolist(),
        "buffers": any(store.length is not None for store in found.stores),
        "report": told.to_dict(),
        "text": str(told),
        "rules": _rules(found),
        "layers": [_layer(layer) for layer in found.layers],
        "held": [[bitmaps.of(layer.held, row) for layer in found.layers] for row in range(found.rows)],
        "whole": [[bitmaps.of(layer.whole, row) for layer in found.layers] for row in range(found.rows)],
        "live": [[_live(layer, row) for layer in found.layers] for row in range(found.rows)],
        "bitmaps": list(bitmaps.known),
        "texts": None if texts is None else [list(text[: found.tokens]) for text in texts],
    }


class _Bitmaps:
    """Different bitmaps in the order in which they were met: heads that hold the same share one."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def of(self, flags: torch.Tensor | None, row: int) -> list[int] | None:
        """The numbers of a row's bitmaps; flags bool [B, H, T]."""
        if flags is None:
            return None
        full = torch.nn.functional.pad(flags[row], (0, -flags.shape[-1] % 8))
        packed = (full.unflatten(-1, (-1, 8)) * BITS).sum(-1)
        texts = (b64encode(bytes(head)).decode() for head in packed.tolist())
        return [self.known.setdefault(text, len(self.known)) for text in texts]


def _live(layer: Layer, row: int) -> list[int] | None:
    return None if layer.held is None else layer.held[row].sum(-1).tolist()


def _layer(layer: Layer) -> dict[str, Any]:
    store = layer.store
    return {
        "name": layer.name,
        "number": layer.number,
        "heads": 0 if layer.held is None else layer.held.shape[1],
        "bytes": layer.bytes,
        "dense_bytes": layer.bytes if store is None else store.dense_bytes,
        "slots": None if store is None else store.slots,
        "note": layer.note,
    }


def _rules(found: Retention) -> list[tuple[str, list[str]]]:
    """What layers of one rule have in common is said once."""
    kinds: dict[tuple[str, ...], list[Layer]] = {}
    for layer in found.layers:
        if layer.store is not None:
            kinds.setdefault(tuple(in_words(layer.store.rule)), []).append(layer)
    several = len(kinds) > 1
    return [
        (f"layers {', '.join(str(one.number) for one in alike)}" if several else "", list(words))
        for words, alike in kinds.items()
    ]
