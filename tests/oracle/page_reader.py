"""Reads a page of `kvpass.page` as any other program would: HTML, JSON, base64 and bits, with none of kvpass' code."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from typing import Any


class PageReader(HTMLParser):
    """The data in a page, and its elements.

    Attributes:
        data: what the script with the id `data` holds.
        attributes: element, name and value of each.
        elements: of each its attributes, and the text in front of its first child or its end.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.elements: list[tuple[str, dict[str, str], str]] = []
        self.open, self.inside = "", False
        self.feed(page)
        self.data: dict[str, Any] = json.loads(self.texts["data"])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in own.items()]
        self.elements.append((tag, own, ""))
        self.open = own.get("id", "") if tag == "script" else ""
        self.inside = True

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open] = self.texts.get(self.open, "") + data
        if self.inside:
            tag, own, text = self.elements[-1]
            self.elements[-1] = tag, own, text + data

    def handle_endtag(self, tag: str) -> None:
        self.open = "" if tag == "script" else self.open
        self.inside = False

    def positions(self, field: str, row: int, layer: int, head: int) -> list[int]:
        """Positions of a head: `field` is `held` or `whole`."""
        packed = base64.b64decode(self.data["bitmaps"][self.data[field][row][layer][head]])
        found = []
        for position in range(8 * len(packed)):
            byte = packed[position // 8]
            if byte // 2 ** (position % 8) % 2 == 1:
                found.append(position)
        return found

    def layer(self, name: str) -> int:
        return [layer["name"] for layer in self.data["layers"]].index(name)
