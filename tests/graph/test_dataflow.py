"""Questions about the flow of values, on graphs drawn by hand."""

from __future__ import annotations

from models.attention import attend, hidden, layer, past
from models.graphs import capture, node
from torch import fx, nn

from kvpass.graph.calls import call_name, changes, is_metadata, source_line
from kvpass.graph.dataflow import Flow, data_inputs, flat_outputs


def drawn(edges: str, returned: str) -> tuple[Flow, dict[str, fx.Node]]:
    """`a>b b>c`: nodes in order of first mention, each a call `f` of those before it."""
    graph, nodes, inputs = fx.Graph(), {}, {}
    for edge in edges.split():
        start, end = edge.split(">")
        inputs.setdefault(start, [])
        inputs.setdefault(end, []).append(start)
    for name, above in inputs.items():
        args = tuple(nodes[n] for n in above)
        nodes[name] = (
            graph.create_node("call_method", "size" if name == "m" else name, args, name=name)
            if above
            else graph.placeholder(name)
        )
    graph.output(tuple(nodes[n] for n in returned))
    return Flow(graph), nodes


def test_between_is_all_paths():
    flow, n = drawn("a>b a>c b>d c>d d>e a>e", "e")
    assert flow.between(n["a"], n["d"]) == {n[x] for x in "abcd"}
    assert flow.between(n["b"], n["e"]) == {n[x] for x in "bde"}
    assert flow.between(n["b"], n["c"]) == set()
    assert flow.between(n["d"], n["a"]) == set()


def test_escapes():
    flow, n = drawn("a>b b>c b>x b>m a>y", "cb")
    assert flow.escapes([n["b"]], [n["c"]]) == [n["x"]]  # a return and a read of the size are none
    assert flow.escapes([n["a"], n["b"]], [n["c"], n["x"]]) == [n["y"]]
    assert flow.escapes([n["a"]], [n["b"], n["y"]]) == []


def test_below_is_breadth_first_and_limited():
    flow, n = drawn("a>b a>c b>d d>sdpa c>softmax", "d")
    assert list(flow.below(n["a"], frozenset({"sdpa", "softmax"}))) == [n["softmax"], n["sdpa"]]
    assert list(flow.below(n["a"], frozenset({"sdpa"}), limit=2)) == []


def test_outputs():
    flow, n = drawn("a>b b>c", "bcb")
    assert flow.outputs == {n["b"]: [0, 2], n["c"]: [1]}
    assert flat_outputs(flow.output) == [n["b"], n["c"], n["b"]]


def test_data_inputs_are_those_that_are_computed_with():
    def forward(self, x, cache, other):
        q, k, v = self.project(x)
        return attend(q, k, v) * other[0].shape[2], cache[0] + 1, other[1]

    gm = capture(layer(forward), hidden(), past(), past())
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    assert {names[at] for at in data_inputs(gm.graph)} == {"l_x_", "l_cache_0_"}


def test_names_do_not_depend_on_the_spelling():
    class Model(nn.Module):
        def forward(self, x):
            x = x.view(4, 3).swapaxes(0, 1)
            x += 1
            x.mul_(2)
            return x.expand_as(x), x.stride(0) * x.dim()

    gm = capture(Model(), hidden(1, 1).flatten()[:12])
    calls = [call_name(n) for n in gm.graph.nodes if n.op.startswith("call")]
    assert calls[:4] == ["reshape", "transpose", "iadd", "mul_"]
    assert [changes(n) for n in gm.graph.nodes if n.op.startswith("call")][:4] == [False, False, True, True]
    assert "test_dataflow.py" in source_line(node(gm, "reshape"))
    assert source_line(node(gm, "reshape")).endswith("x = x.view(4, 3).swapaxes(0, 1)")


def test_metadata():
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert is_metadata(graph.call_method("size", (x, 1)))
    assert is_metadata(graph.call_function(getattr, (x, "shape")))
    assert not is_metadata(graph.call_function(getattr, (x, "mT")))
    assert not is_metadata(x)
