"""The debug report: its stages read as Python, reruns are clean, and nothing in it can break a compilation."""

from __future__ import annotations

import ast
import builtins
import json
import logging
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import kvpass
from kvpass import debug
from kvpass.debug import drawing, neighbourhood, output_code, page, report, source
from kvpass.pipeline.graphs import GraphRecord
from kvpass.sites.table import SiteTable

STAGES = (
    "01_captured.py",
    "02_sites.json",
    "02_sites.txt",
    "03_plan.json",
    "03_plan.txt",
    "04_rewritten.py",
    "05_diff_00_blocks.0.diff",
    "05_diff_01_blocks.1.diff",
    "06_layer_after.svg",
    "06_layer_before.svg",
    "07_inner.txt",
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, n) for n in (16, 8, 8, 16))

    def forward(self, x: Tensor, past: Any) -> tuple[Tensor, Any]:
        rows, tokens = x.shape[:2]
        q = self.q_proj(x).view(rows, tokens, 2, 8).transpose(1, 2)
        k = self.k_proj(x).view(rows, tokens, 1, 8).transpose(1, 2)
        v = self.v_proj(x).view(rows, tokens, 1, 8).transpose(1, 2)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=past is None, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(rows, tokens, 16)), (k, v)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        x, caches = self.embed(ids), []
        for at, block in enumerate(self.blocks):
            x, cache = block(x, None if past is None else past[at])
            caches.append(cache)
        return x, tuple(caches)


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder was written to in this process."""
    monkeypatch.setattr(report, "_FOLDERS", {})


def run(folder: Any, policy: str = "h2o", decode: bool = True, inner: str = "eager") -> Any:
    model = kvpass.compile(Model().eval(), policy, 8, inner=inner, debug=str(folder) if folder else None)
    ids = torch.randint(0, 9, (1, 20))
    with torch.no_grad():
        _, past = model(ids)
        if decode:
            model(ids[:, :1], past)
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a prefill and a decode graph."""
    folder = tmp_path_factory.mktemp("report")
    torch._dynamo.reset()
    run(folder)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_graph_has_every_stage(written: Path) -> None:
    assert names(written) == ["graph_001_prefill", "graph_002_decode", "index.html"]
    for graph in ("graph_001_prefill", "graph_002_decode"):
        assert names(written / graph) == sorted(STAGES)


@pytest.mark.parametrize("name", ["01_captured.py", "04_rewritten.py"])
def test_graphs_are_python(written: Path, name: str) -> None:
    for graph in ("graph_001_prefill", "graph_002_decode"):
        text = (written / graph / name).read_text()
        function = next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
        assert function.name == "forward"
        assert isinstance(function.body[-1], ast.Return)
        assert re.search(r"# blocks\.0.*test_debug_report\.py:\d+ in forward", text), "module and source line"


def test_rewritten_graph_marks_what_is_ours(written: Path) -> None:
    text = (written / "graph_002_decode" / "04_rewritten.py").read_text()
    fenced = re.findall(r"# >>> kvpass (\S+) >>>\n(.*?)# <<< kvpass <<<", text, re.DOTALL)
    assert [name for name, _ in fenced] == ["blocks.0", "blocks.1"]
    assert all("torch.ops.kvpass.decode_attend.default(" in body and "F.scaled_dot" in body for _, body in fenced)
    assert "kvpass_0_cursor: " in text
    assert "# kvpass: state of blocks.0, cursor" in text
    assert "cat(" not in re.sub("#.*", "", text)


def test_tables_and_plans_are_json(written: Path) -> None:
    sites = json.loads((written / "graph_001_prefill" / "02_sites.json").read_text())
    plan = json.loads((written / "graph_001_prefill" / "03_plan.json").read_text())
    assert [site["site"] for site in sites["sites"]] == ["blocks.0", "blocks.1"]
    assert plan["sites"][0]["ops"][0] == "prefill_attend"


def test_diff_shows_the_site_and_little_else(written: Path) -> None:
    lines = (written / "graph_002_decode" / "05_diff_01_blocks.1.diff").read_text().splitlines()
    removed = [line for line in lines if line.startswith("-") and not line.startswith(("---", "-#"))]
    added = [line for line in lines if line.startswith("+") and not line.startswith(("+++", "+#"))]
    assert sum("torch.cat(" in line for line in removed) == 2
    assert sum("scaled_dot_product_attention(" in line for line in removed) == 1
    assert sum("kvpass.decode_attend" in line for line in added) == 1
    assert sum("# kvpass: state of blocks.1" in line for line in added) == 5
    assert not any("embedding" in line or "blocks.0" in line for line in lines)


def test_drawings_name_the_parts(written: Path) -> None:
    before = (written / "graph_002_decode" / "06_layer_before.svg").read_text()
    after = (written / "graph_002_decode" / "06_layer_after.svg").read_text()
    assert all(f"<!-- {text} -->" in before for text in ("q_proj", "k_proj", "v_proj", "o_proj", "sdpa", "past K"))
    assert all(
        f"<!-- {text} -->" in after for text in ("q_proj", "o_proj", "kvpass::decode_attend", "state of the site")
    )


def test_drawings_have_no_overlapping_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []
    monkeypatch.setattr(drawing, "draw", lambda graph, path, title: graphs.append(graph))
    run(tmp_path, decode=False)
    assert len(graphs) == 2
    for graph in graphs:
        places, sizes = drawing.layout(graph)
        boxes = [(places[node], sizes[node]) for node in places]
        for at, ((x, y), (width, height)) in enumerate(boxes):
            for (x2, y2), (width2, height2) in boxes[:at]:
                assert abs(x - x2) >= (width + width2) / 2 - 1e-6 or abs(y - y2) >= (height + height2) / 2 - 1e-6


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.local: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.local += [value for key, value in attrs if key in ("href", "src") and value]


def test_index_links_every_file_and_nothing_outside(written: Path) -> None:
    links = Links()
    links.feed((written / "index.html").read_text())
    files = {str(p.relative_to(written)) for p in written.rglob("*") if p.is_file() and p.name != "index.html"}
    assert set(links.local) == files


def test_index_is_escaped(tmp_path: Path) -> None:
    entry = report.Entry("graph_001_prefill", "<b>&", {"rule": "<i>"}, [], [], [], ["note <script>"])
    text = page.index(tmp_path, [report.Run(None, "policy <x>", 0, [entry])], {tmp_path / "<u>.html": "<y>"})
    assert not any(tag in text for tag in ("<script>", "<i>", "<x>", "<b>&<", "<u>", "<y>"))
    assert "note &lt;script&gt;" in text


def test_a_rerun_replaces_the_old_report_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "graph_999_decode").mkdir()
    monkeypatch.setattr(report, "_FOLDERS", {})
    torch._dynamo.reset()
    run(tmp_path, decode=False)
    assert names(tmp_path) == ["graph_001_prefill", "graph_999_decode", "index.html", "notes.txt"]
    assert "graph_002" not in (tmp_path / "index.html").read_text()


def test_two_models_in_one_folder_stay_apart(tmp_path: Path) -> None:
    run(tmp_path, "h2o")
    torch._dynamo.reset()
    run(tmp_path, "tova", decode=False)
    assert names(tmp_path) == ["graph_001_prefill", "graph_002_decode", "graph_003_prefill", "index.html"]
    text = (tmp_path / "index.html").read_text()
    assert text.index("policy tova") < text.index("policy h2o"), "newest first"


def test_without_matplotlib_the_index_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def blocked(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    run(tmp_path, decode=False)
    assert not list(tmp_path.rglob("*.svg"))
    assert "pip install &#x27;kvpass[report]&#x27;" in (tmp_path / "index.html").read_text()


def test_a_broken_stage_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> str:
        raise ValueError("no <luck>")

    monkeypatch.setattr(report, "site_diff", broken)
    run(tmp_path, decode=False)
    assert "ValueError: no &lt;luck&gt;" in (tmp_path / "index.html").read_text()
    assert (tmp_path / "graph_001_prefill" / "04_rewritten.py").is_file()


def test_an_unwritable_folder_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "kvpass"):
        run(tmp_path / "file" / "below", decode=False)
    assert "was not written" in caplog.text


def test_inductor_output_code_is_copied(tmp_path: Path) -> None:
    run(tmp_path, decode=False, inner="inductor")
    folder = tmp_path / "graph_001_prefill"
    place = re.search(r"output code: (\S+\.py)", (folder / "07_inner.txt").read_text())
    assert place is not None
    assert "prefill_attend" in Path(place.group(1)).read_text()
    assert (folder / "07_inner_1.py").read_text() == Path(place.group(1)).read_text()


def test_unknown_code_cache_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import codecache

    monkeypatch.setattr(codecache, "PyCodeCache", type("PyCodeCache", (), {}))
    with output_code.OutputCode() as code:
        pass
    assert "not found" in code.describe(None)


def test_a_failing_inner_compiler_is_reported(tmp_path: Path) -> None:
    captured: list[Any] = []
    backend = kvpass.backend("h2o", 8, inner="eager")

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        captured.append(gm)
        return backend(gm, inputs)

    with torch.no_grad():
        torch.compile(Model().eval(), backend=keep)(torch.randint(0, 9, (1, 20)))
    record = backend.graphs[0]
    from kvpass.lowering.lower import lower

    with (
        pytest.raises(RuntimeError, match="no compiler"),
        debug.stages(str(tmp_path), 1, captured[0], record, lower(captured[0], record.plan)),
    ):
        raise RuntimeError("no compiler")
    assert "RuntimeError: no compiler" in (tmp_path / "graph_001_prefill" / "07_inner.txt").read_text()


def test_a_graph_without_a_rewrite_has_a_report(tmp_path: Path) -> None:
    graph = fx.symbolic_trace(lambda x: -x[..., 1:, None])
    record = GraphRecord(SiteTable())
    with debug.stages(str(tmp_path), 1, graph, record, None):
        pass
    assert names(tmp_path / "graph_001_untouched") == [
        "01_captured.py",
        "02_sites.json",
        "02_sites.txt",
        "07_inner.txt",
    ]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x[..., :-1, None], "x[..., :-1, None]"),
        (lambda x: x[1:2], "x[1:2]"),
        (lambda x: x[::2], "x[::2]"),
        (lambda x: x @ x.mT, "x @ getattr_1"),
        (lambda x: -x, "-x"),
        (lambda x: x.shape, "x.shape"),
        (lambda x: torch.cat([x, x], dim=1), "torch.cat([x, x], dim=1)"),
        (lambda x: x.to(torch.float16), "x.to(torch.float16)"),
        (lambda x: F.softmax(x, -1), "torch.nn.functional.softmax(x, dim=-1"),
    ],
)
def test_statements_read_as_written(function: Any, expected: str) -> None:
    nodes = list(fx.symbolic_trace(function).graph.nodes)
    statement = source.statement(nodes[-2])
    assert expected in statement
    ast.parse(statement)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.zeros(2, 3), "f32[2, 3]"),
        (torch.zeros(1, dtype=torch.bfloat16), "bf16[1]"),
        (torch.zeros(1, dtype=torch.bool), "b8[1]"),
        (torch.zeros((), dtype=torch.int64), "i64[]"),
        (None, ""),
    ],
)
def test_types_are_short(value: Any, expected: str) -> None:
    assert source.describe(value) == expected


@pytest.mark.parametrize(
    ("argument", "variable", "expected"),
    [
        (None, None, None),
        (None, "0", None),
        (None, "1", "kvpass_debug"),
        (None, "there", "there"),
        (True, None, "kvpass_debug"),
        ("here", "there", "here"),
        (False, "1", None),
    ],
)
def test_where_the_report_goes(
    monkeypatch: pytest.MonkeyPatch, argument: Any, variable: str | None, expected: str | None
) -> None:
    monkeypatch.delenv("KVPASS_DEBUG", raising=False)
    if variable is not None:
        monkeypatch.setenv("KVPASS_DEBUG", variable)
    assert debug.debug_folder(argument) == expected


def test_without_a_folder_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, torch, kvpass, kvpass.debug; kvpass.backend('h2o', 0.5); "
        "print([m for m in sys.modules if m.startswith(('matplotlib', 'kvpass.debug.'))])"
    )
    assert (
        subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    )


def test_artifacts_reach_the_structured_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    def record(kind: str, metadata_fn: Any = dict, *, payload_fn: Any = str, **rest: Any) -> None:
        if kind == "artifact" and metadata_fn()["name"].startswith("kvpass"):
            seen[metadata_fn()["name"]] = payload_fn()

    monkeypatch.setattr(torch._logging, "trace_structured", record)
    run(None, decode=False)
    assert set(seen) == {"kvpass_1_sites", "kvpass_1_plan", "kvpass_1_rewritten"}
    assert json.loads(seen["kvpass_1_sites"])["sites"][0]["site"] == "blocks.0"
    assert "torch.ops.kvpass.prefill_attend.default(" in seen["kvpass_1_rewritten"]


def test_every_projection_and_op_is_in_the_neighbourhood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    monkeypatch.setattr(drawing, "draw", lambda graph, path, title: found.update({path.name: graph}))
    run(tmp_path, decode=False)
    kinds = [found["06_layer_after.svg"].nodes[node]["box"].kind for node in found["06_layer_after.svg"]]
    assert kinds.count("projection") == 4
    assert kinds.count("kvpass") == 4
    assert neighbourhood.OUTPUTS["score_slots"] == ("score", "stats", "cursor")
