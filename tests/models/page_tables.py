"""Tables of documentation pages, so that tests can hold them to what is so."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def table(page: str, first: str) -> dict[str, tuple[str, ...]]:
    """The rows of the table whose header begins with this cell: first cell -> the others."""
    found: dict[str, tuple[str, ...]] = {}
    inside = False
    for line in (DOCS / page).read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells[:1] == [first]:
            inside = True
        elif inside and not cells:
            return found
        elif inside and set("".join(cells)) - set("-: "):
            assert cells[0] not in found, f"two rows of {cells[0]}"
            found[cells[0]] = tuple(cells[1:])
    if not inside:
        raise AssertionError(f"{page} has no table that begins with {first!r}")
    return found
