"""docs/architecture.md shows the rooms as they are."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import rooms_page


def test_the_drawing_is_the_codes() -> None:
    page = rooms_page.PAGE.read_text()
    assert rooms_page.with_drawing(page) == page, "make api"
