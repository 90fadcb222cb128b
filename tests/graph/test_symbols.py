"""Sizes of a traced graph as functions of a call's inputs."""

from __future__ import annotations

import torch
from models.graphs import capture, dynamic

from kvpass.graph.calls import example
from kvpass.graph.symbols import SizeReader, free_size

EXPRESSIONS = [
    lambda n, m: n + 1,
    lambda n, m: n * 2 + m,
    lambda n, m: (n + 1) // 2,
    lambda n, m: n % 3 + 1,
    lambda n, m: n * m,
    lambda n, m: max(n, 3) + 0 * m,
]


def test_expressions():
    def call(x, y):
        return [torch.empty(make(x.shape[0], y.shape[1])) for make in EXPRESSIONS]

    gm = capture(call, dynamic(torch.ones(7, 2), 0), dynamic(torch.ones(2, 5), 1))
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    reader = SizeReader(inputs)
    sizes = [example(n).shape[0] for n in next(iter(reversed(gm.graph.nodes))).args[0]]
    readers = [reader.read(size) for size in sizes]
    for n, m in ((7, 5), (12, 9), (31, 4)):
        given = {"L_x_": torch.ones(n, 2), "L_y_": torch.ones(2, m)}
        args = [given.get(node.target, example(node)) for node in inputs]
        args = [{7: n, 5: m}[a.node.hint] if isinstance(a, torch.SymInt) else a for a in args]
        assert [read(args) for read in readers] == [make(n, m) for make in EXPRESSIONS]


def test_plain_numbers():
    assert SizeReader([]).read(5)([]) == 5


def test_a_free_size_adds_no_guard():
    gm = capture(lambda x: x + 1, dynamic(torch.ones(7, 2), 0))
    env = next(example(n) for n in gm.graph.nodes if isinstance(example(n), torch.Tensor)).fake_mode.shape_env
    before = len(env.guards)
    one, two = (free_size(env, "capacity") for _ in range(2))
    assert isinstance(one, torch.SymInt)
    assert one.node.expr != two.node.expr
    assert len(env.guards) == before
