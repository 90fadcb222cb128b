"""A page to look at: which tokens each head of a cache holds, in one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, overload

import torch

from kvpass.api.spans import Spans
from kvpass.errors import CacheError

TEMPLATE = Path(__file__).with_name("page.html")
"""HTML with the script that draws; the data goes into it."""

BEGINS_A_WORD = ("\u0120", "\u2581")
"""How tokenizers spell a space in front of a token."""


@overload
def page(
    cache: Any, tokens: Any = None, path: None = None, *, tokenizer: Any = None, spans: Spans | None = None
) -> str: ...


@overload
def page(
    cache: Any,
    tokens: Any = None,
    path: str | PathLike[str] = ...,
    *,
    tokenizer: Any = None,
    spans: Spans | None = None,
) -> Path: ...


def page(
    cache: Any,
    tokens: Any = None,
    path: str | PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    spans: Spans | None = None,
) -> Path | str:
    """A page to look at: which tokens each head of each layer holds, live counts, bytes, and the rule in words. One
    HTML file, which needs no network; drag over the map to look closer, move over it to read the tokens.

    Args:
        cache: as for `report`.
        tokens: the text of the columns, as the model was given it, padding included. Ids, int tensor `[T]` or
            `[rows, T]` or lists of them: shown as `tokenizer` decodes them, one by one, else as numbers. Or strings, a
            list of T of them, or one such list for each row. May be shorter or longer than the cache.
        path: where to write it; None: the HTML is returned. In the folder of a debug report of this process, the
            report's index links to it.
        tokenizer: what decodes ids: `tokenizer.decode([id])`.
        spans: ranges of tokens to mark, as for `report`.

    Returns the path, or the HTML.

    Raises:
        CacheError: no compressed cache in it; tokens of another number of rows; a span that is out of range; or the
            file cannot be written.
    """
    import html
    import json

    from kvpass import debug
    from kvpass.api.page_data import page_data  # here what `import kvpass` need not load

    data = page_data(cache, None if tokens is None else texts_of(tokens, tokenizer), spans)
    title = f"kvpass: {data['report']['policy']}, budget {data['report']['budget']}, {data['tokens']} tokens"
    text = TEMPLATE.read_text(encoding="utf-8")
    text = text.replace("{{title}}", html.escape(title)).replace("{{text}}", html.escape(data["text"]))
    text = text.replace("{{data}}", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))
    if path is None:
        return text
    where = Path(path)
    try:
        where.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CacheError(f"no page at {where}: {error}", hint="give a path in a folder that exists") from error
    debug.linked(where, title)
    return where


def texts_of(tokens: Any, tokenizer: Any = None) -> list[list[str]]:
    """The strings of each row, of what `page` takes.

    Raises:
        CacheError: they are neither ids nor lists of strings.
    """
    if isinstance(tokens, torch.Tensor):
        tokens = tokens.tolist()
    if isinstance(tokens, str) or not isinstance(tokens, Sequence):
        raise CacheError(
            f"tokens are {type(tokens).__name__}, not ids or a list of strings",
            hint="give the ids that the model was given, with tokenizer=, or a string for each of them",
        )
    flat = not tokens or isinstance(tokens[0], (str, int))
    decode = _decoding(tokenizer)
    return [
        [one if isinstance(one, str) else decode(int(one)) for one in row] for row in ([tokens] if flat else tokens)
    ]


def _decoding(tokenizer: Any) -> Callable[[int], str]:
    """Ids one by one; a space in front is kept, which some tokenizers drop of a text's first token."""
    if tokenizer is None:
        return lambda one: f" {one}"
    known: dict[int, str] = {}
    pieces = getattr(tokenizer, "convert_ids_to_tokens", None)

    def decode(one: int) -> str:
        if one not in known:
            text = str(tokenizer.decode([one]))
            spaced = pieces is not None and str(pieces(one)).startswith(BEGINS_A_WORD)
            known[one] = f" {text}" if spaced and not text[:1].isspace() else text or f"<{one}>"
        return known[one]

    return decode
