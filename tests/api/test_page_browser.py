"""`kvpass.page` in a real browser: its script runs without errors, and shows what `kvpass.inspect` finds.

Needs chromium (on Debian: apt install chromium), which pip cannot bring: so it is `wide`, and fails where there is
none. What the page's data is, any machine tests (test_page.py).
"""

from __future__ import annotations

import json
import random
import re
import time
from base64 import b64decode, b64encode
from collections import Counter
from pathlib import Path
from typing import Any

import chromium
import pytest
import torch
from matplotlib.image import imread
from models import tiny
from oracle.page_reader import PageReader
from spelling import cache_of, with_cache

import kvpass

pytestmark = pytest.mark.wide

LENGTHS = [90, 61]
T = LENGTHS[0]
WHOLE, CODES = (31, 78, 121), (224, 150, 50)


@pytest.fixture(scope="module", autouse=True)
def browser() -> str:
    try:
        return chromium.find()
    except FileNotFoundError as error:
        pytest.fail(str(error))


def cache(policy: str, budget: Any) -> Any:
    model = kvpass.compile(tiny.llama(), policy, budget, inner="eager")
    ids, mask = tiny.left_padded(LENGTHS)
    with torch.no_grad():
        return cache_of(model(input_ids=ids, attention_mask=mask, use_cache=True))


def body(dom: str) -> dict[str, str]:
    found = re.search(r"<body([^>]*)>", dom)
    assert found
    return dict(re.findall(r'data-(\w+)="([^"]*)"', found[1]))


@pytest.mark.parametrize("row", [0, 1])
def test_the_script_shows_what_inspect_finds(tmp_path: Path, row: int) -> None:
    held = cache("layer_defensivekv", 48)
    words = [[f" r{at}t{column}" for column in range(T)] for at in (0, 1)]
    path = kvpass.page(held, words, tmp_path / "page.html", spans={"code": [(5, 9), (40, 42)]})
    dom = chromium.dom(path, f"#row={row}")
    assert body(dom) == {"ready": f"2 layers, 4 heads, {T} positions"}
    page = PageReader(dom)
    counts: Counter[int] = Counter()
    for layer in kvpass.inspect(held).layers:
        for positions in layer.positions[row].tolist():
            counts.update(p for p in positions if p >= 0)
    shown = {int(own["data-p"]): (own, text) for tag, own, text in page.elements if "data-p" in own}
    assert {p: int(own["data-n"]) for p, (own, _) in shown.items()} == {p: counts[p] for p in range(T)}
    assert all(text == f" r{row}t{p}" for p, (_, text) in shown.items())
    padding = T - LENGTHS[row]
    kinds = {p: set(own["class"].split()) for p, (own, _) in shown.items()}
    assert all(("pad" in kinds[p]) == (p < padding) for p in range(T))
    assert all(("gone" in kinds[p]) == (p >= padding and not counts[p]) for p in range(T))
    start, stop = [(5, 9), (40, 42)][row]
    assert [p for p in range(T) if "in" in kinds[p]] == list(range(start, stop))
    cells = [text for tag, _, text in page.elements if tag == "td"]
    live = [(layer.positions[row] >= 0).sum(-1).tolist() for layer in kvpass.inspect(held).layers]
    assert [cell for cell in cells if re.fullmatch(r"\d+ \d+", cell)] == [" ".join(map(str, some)) for some in live]
    assert len([own for tag, own, _ in page.elements if tag == "rect" and own.get("fill") == "#d93a2b"]) == 1


def test_bytes_over_time_are_those_of_the_report(tmp_path: Path) -> None:
    """The line's corners, read back: tokens across, bytes up, most at 18 and none at 120."""
    model = kvpass.compile(tiny.llama(), "full", None, inner="eager")
    ids, mask = tiny.left_padded([T, T])
    held = None
    with torch.no_grad():
        for start in (0, 40, 70):
            stop = {0: 40, 40: 70, 70: T}[start]
            more = with_cache(model, held) if held is not None else {}
            held = cache_of(model(ids[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, **more))
    told = kvpass.report(held).to_dict()
    dom = chromium.dom(kvpass.page(held, path=tmp_path / "page.html"))
    assert "error" not in body(dom)
    (path,) = [own for tag, own, _ in PageReader(dom).elements if tag == "path" and own.get("class") == "held"]
    corners = re.findall(r"L([\d.]+) ([\d.]+)H([\d.]+)", path["d"])
    most = max(told["dense_bytes"], *(size for _, size in told["course"]))
    read = [(round(float(x) * T / 1000), most * (1 - (float(y) - 18) / 102)) for x, y, _ in corners]
    assert [tokens for tokens, _ in read] == [tokens for tokens, _ in told["course"]] == [40, 70, T]
    assert [size for _, size in read] == pytest.approx([size for _, size in told["course"]], abs=most / 1000)
    assert [end for *_, end in corners] == [start for start, *_ in corners[1:]] + ["1000.0"]


HAND = """<script>
const box = document.getElementById("map").getBoundingClientRect(), status = document.getElementById("status");
const mouse = (kind, x, y) => document.getElementById("map").dispatchEvent(new MouseEvent(kind,
  { bubbles: true, clientX: box.left + x * box.width, clientY: box.top + y * box.height }));
const said = {};
mouse("mousemove", 0.5 / 90, 0.999); said.hover = status.textContent;
mouse("mousedown", 9.5 / 90, 0.5); mouse("mousemove", 20 / 90, 0.5); mouse("mouseup", 27.5 / 90, 0.5);
said.near = document.getElementById("view").textContent;
said.shown = [...document.querySelectorAll("#tokens span")].map((node) => Number(node.dataset.p));
document.querySelector("#tokens span").dispatchEvent(new MouseEvent("mousemove", { bubbles: true }));
said.text = status.textContent;
document.getElementById("all").click(); said.all = document.getElementById("view").textContent;
const chooser = document.getElementById("row"); chooser.value = "1"; chooser.dispatchEvent(new Event("change"));
mouse("mousemove", 0.5 / 90, 0.001); said.other = status.textContent;
document.body.dataset.said = btoa(unescape(encodeURIComponent(JSON.stringify(said))));
</script></body>"""
"""A user's hand: over the map's lower left corner, a drag from position 9 to 27, over the text, back to all of it, the
other sequence."""


def test_it_answers_to_the_mouse(tmp_path: Path) -> None:
    held = cache("ada_snapkv", 40)
    words = [[f" r{at}t{column}" for column in range(T)] for at in (0, 1)]
    path = kvpass.page(held, words, tmp_path / "page.html")
    path.write_text(path.read_text().replace("</body>", HAND))
    facts = body(chromium.dom(path))
    assert "error" not in facts
    said = json.loads(b64decode(facts["said"]))
    views = kvpass.inspect(held).layers
    holding = [0 in head for layer in views for head in layer.positions[0].tolist()]
    last = "held" if holding[-1] else "gone"
    assert said["hover"].startswith(f'position 0 " r0t0"; layer 1, head 1: {last}; held by {sum(holding)} of 4 heads')
    assert said["near"] == "positions 9..27 of 90"
    assert said["shown"] == list(range(9, 28))
    assert said["text"].startswith('position 9 " r0t9"; held by')
    assert said["all"] == "positions 0..89 of 90"
    assert said["other"].startswith('position 0 " r1t0"; layer 0, head 0: padding; held by 0 of 4 heads')


def test_an_error_would_be_seen(tmp_path: Path) -> None:
    text = kvpass.page(cache("h2o", 24))
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace('"layers":', '"lawyers":'))
    assert "error" in body(chromium.dom(broken))


def pixels(path: Path, to: Path) -> Counter[tuple[int, ...]]:
    chromium.screenshot(path, to, 1200, 1000)
    image = (imread(to)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    return Counter(map(tuple, image.tolist()))


def test_the_picture_has_the_colours_of_what_is_held(tmp_path: Path) -> None:
    """Of tokens that are demoted, and not where none is."""
    demoted = pixels(kvpass.page(cache("mikv", 0.5), path=tmp_path / "mikv.html"), tmp_path / "mikv.png")
    assert demoted[WHOLE] > 1000
    assert demoted[CODES] > 1000
    plain = pixels(kvpass.page(cache("h2o", 24), path=tmp_path / "h2o.html"), tmp_path / "h2o.png")
    assert plain[WHOLE] > 1000
    assert not plain[CODES]


def test_32k_positions_of_240_heads(tmp_path: Path) -> None:
    """Random bits, of which no two heads share any: 1.3 MB of bitmaps; drawn in seconds."""
    tokens, layers, heads = 32_768, 30, 8
    html = kvpass.page(cache("h2o", 24))
    data = PageReader(html).data
    rng = random.Random(0)
    data |= {
        "tokens": tokens,
        "rows": 1,
        "first": [0],
        "layers": [data["layers"][0] | {"number": at, "name": f"layers.{at}", "heads": heads} for at in range(layers)],
        "held": [[list(range(heads * at, heads * (at + 1))) for at in range(layers)]],
        "whole": [[None] * layers],
        "live": [[[tokens // 2] * heads] * layers],
        "bitmaps": [b64encode(rng.randbytes(tokens // 8)).decode() for _ in range(layers * heads)],
        "texts": [[f" word{at}" for at in range(tokens)]],
    }
    large = tmp_path / "large.html"
    script = json.dumps(data, separators=(",", ":"))
    large.write_text(re.sub(r'(?s)(id="data">).*?(</script>)', lambda m: m[1] + script + m[2], html))
    assert large.stat().st_size < 2_000_000
    start = time.perf_counter()
    dom = chromium.dom(large)
    seconds = time.perf_counter() - start
    assert body(dom) == {"ready": f"{layers} layers, {layers * heads} heads, {tokens} positions"}
    assert seconds < 60, "a machine of two cores that is busy takes 10"
    shown = {int(own["data-p"]): int(own["data-n"]) for _, own, _ in PageReader(dom).elements if "data-p" in own}
    assert list(shown) == list(range(4000))
    assert 90 < sum(shown.values()) / len(shown) < 150
