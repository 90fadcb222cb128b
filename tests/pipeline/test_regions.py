"""Cutting a graph into regions: equal layers are one kind, unequal ones never, and together they are the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.graphs import dynamic
from torch import Tensor, fx, nn

from kvpass.pipeline.regions import Region, regions
from kvpass.pipeline.stitch import Compile, Stitched

WIDTH, LAYERS = 8, 6


class Layer(nn.Module):
    """A residual layer of some 15 nodes; what the traps change is an attribute."""

    eps, power, swapped, keep, dtype, alpha = 1e-6, 2, False, True, torch.float32, 1

    def __init__(self, inner: int = 16) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(WIDTH, inner, bias=False), nn.Linear(WIDTH, inner, bias=False)
        self.down = nn.Linear(inner, WIDTH, bias=False)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        mean = x.pow(self.power).mean(-1, keepdim=self.keep)
        scaled = (x * torch.rsqrt((mean if self.keep else mean[..., None]) + self.eps)).to(self.dtype).to(x.dtype)
        up, gate = self.up(scaled), torch.sigmoid(self.gate(scaled))
        mixed = gate - up if self.swapped else up - gate
        return torch.add(x, self.down(torch.tanh(mixed) * gate) * shared, alpha=self.alpha)


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module], every: bool = False) -> None:
        super().__init__()
        self.layers, self.every = nn.ModuleList(layers), every
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Any:
        x, shared, seen = self.embed(x), torch.cos(x.sum(-1, keepdim=True)) + 2, []
        for layer in self.layers:
            x = layer(x, shared)
            seen.append(x)
        return (self.head(x), *seen) if self.every else self.head(x)


def stack(change: Callable[[list[Any]], None] = lambda layers: None, **kwargs: Any) -> Stack:
    torch.manual_seed(0)
    layers = [Layer() for _ in range(LAYERS)]
    change(layers)
    return Stack(layers, **kwargs).eval()


def sizes_of(found: list[Region] | None) -> list[int]:
    """How often each kind comes, the most frequent one first."""
    return sorted(Counter(one.kind for one in found or []).values(), reverse=True)


class Cutter:
    """A backend that runs each graph in pieces, node by node, and notes what it was given to compile.

    compile: what makes a function of a piece; by default the piece itself.
    """

    def __init__(self, compile: Compile = lambda part, inputs: part.forward) -> None:
        self.compile, self.found, self.made = compile, [], []

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.found.append(regions(gm))
        if self.found[-1] is None:
            return gm.forward
        return Stitched(gm, self.found[-1], self._noting)

    def _noting(self, part: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.made.append(part)
        return self.compile(part, inputs)


def run(model: nn.Module, *calls: tuple[Any, ...], cutter: Cutter | None = None) -> Cutter:
    """The calls give what the model gives, in pieces or not."""
    torch._dynamo.reset()
    cutter = cutter or Cutter()
    compiled = torch.compile(model, backend=cutter)
    with torch.no_grad():
        for args in calls:
            for ours, theirs in zip(flat(compiled(*args)), flat(model(*args)), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    return cutter


def flat(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def check(model: nn.Module, *args: Any) -> list[int]:
    """One graph; how often each kind comes; [] if it is not cut."""
    cutter = run(model, args)
    (found,) = cutter.found
    assert len(cutter.made) == len({one.kind for one in found or []})
    return sizes_of(found)


X = torch.linspace(-1, 1, 12).view(1, 3, 4)


def test_equal_layers_are_one_kind() -> None:
    assert check(stack(), X) == [LAYERS, 1, 1]


def test_outputs_from_between_the_layers() -> None:
    assert check(stack(every=True), X) == [LAYERS, 1, 1]


@pytest.mark.parametrize("layers", [1, 2])
def test_few_layers_stay_one_graph(layers: int) -> None:
    assert check(Stack([Layer() for _ in range(layers)]).eval(), X) == []


def test_layers_of_different_widths_stay_one_graph() -> None:
    assert check(Stack([Layer(inner=4 + n) for n in range(LAYERS)]).eval(), X) == []


def test_two_kinds_in_turns() -> None:
    def every_third(layers: list[Any]) -> None:
        for layer in layers[2::3]:
            layer.eps = 1e-3

    assert check(stack(every_third), X) == [4, 2, 1, 1]


TRAPS = {
    "a constant": {"eps": 1e-5},
    "a sign of zero": {"eps": -0.0},
    "an int that is a float": {"power": 2.0},
    "a keyword": {"alpha": 2},
    "swapped operands": {"swapped": True},
    "a flag": {"keep": False},
    "a dtype": {"dtype": torch.float64},
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_layer_that_differs_is_no_other(trap: str) -> None:
    def change(layers: list[Any]) -> None:
        for layer in layers:
            layer.eps = 0.0 if trap == "a sign of zero" else layer.eps
        for name, value in TRAPS[trap].items():
            setattr(layers[3], name, value)

    counts = check(stack(change), X)
    assert counts[0] == LAYERS - 1
    assert all(count < 3 for count in counts[1:])


def test_a_weight_of_another_width_or_dtype_makes_another_kind() -> None:
    def wider(layers: list[Any]) -> None:
        layers[1] = Layer(inner=12)

    def trained(layers: list[Any]) -> None:
        layers[4].down.weight.requires_grad_(False)

    assert check(stack(wider), X)[0] == LAYERS - 1
    assert check(stack(trained), X)[0] == LAYERS - 1


class Telling(Layer):
    """Tells its gate to whoever asks."""

    def forward(self, x: Tensor, shared: Tensor, told: list[Tensor] | None = None) -> Tensor:
        gate = torch.sigmoid(self.gate(x))
        if told is not None:
            told.append(gate)
        return x + self.down(torch.tanh(self.up(x)) * gate * shared).relu().exp().sin().cos().tanh()


class Asking(Stack):
    def forward(self, x: Tensor) -> Any:
        x, shared, told = self.embed(x), torch.ones(1), []
        for at, layer in enumerate(self.layers):
            x = layer(x, shared, told if at == 2 else None)
        return self.head(x), told[0]


def test_a_layer_whose_inner_value_is_read_far_below_is_no_other() -> None:
    torch.manual_seed(0)
    assert check(Asking([Telling() for _ in range(LAYERS)]).eval(), X)[0] == LAYERS - 1


class InPlace(Layer):
    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        x += super().forward(x, shared)
        return x


def test_a_stream_that_is_changed_in_place_is_not_cut() -> None:
    torch.manual_seed(0)
    assert check(Stack([InPlace() for _ in range(LAYERS)]).eval(), X) == []


class Counting(Layer):
    """Writes to a buffer of its own, as a preallocated cache is written."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, 3, WIDTH))

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        self.seen.copy_(torch.tanh(x))
        return super().forward(x + self.seen.sum(1, keepdim=True), shared)


def test_buffers_are_written_layer_by_layer() -> None:
    torch.manual_seed(0)
    model, same = (Stack([Counting() for _ in range(LAYERS)]).eval() for _ in range(2))
    same.load_state_dict(model.state_dict())
    cutter = Cutter()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=cutter)(X), same(X), rtol=0, atol=0)
    assert sizes_of(cutter.found[0])[0] == LAYERS
    for layer, other in zip(model.layers, same.layers, strict=True):
        torch.testing.assert_close(layer.seen, other.seen, rtol=0, atol=0)


class Past(nn.Module):
    """Each layer reads a past of its own, whose length changes from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x: Tensor, *pasts: Tensor) -> Tensor:
        for layer, past in zip(self.layers, pasts, strict=True):
            weights = torch.softmax(x @ past.transpose(1, 2), -1)
            x = layer(x + weights @ past / (past.shape[1] + 1), torch.ones(1))
        return x


def pasts(lengths: list[int]) -> list[Tensor]:
    return [torch.randn(1, length, WIDTH) for length in lengths]


def test_sizes_that_change_are_renamed() -> None:
    torch.manual_seed(0)
    model, x = Past().eval(), torch.randn(1, 2, WIDTH)
    first = (x, *(dynamic(past, 1) for past in pasts([7] * LAYERS)))
    cutter = run(model, first, (x, *pasts([3, 4, 5, 6, 7, 8])))
    (found,) = cutter.found  # one graph for both calls
    assert sizes_of(found)[0] >= LAYERS - 1


def test_a_guard_of_the_compiled_layer_must_hold_for_its_likes() -> None:
    """A compiler that takes `past > 5` for granted: layers with a shorter past get code of their own, and the guard."""
    torch.manual_seed(0)
    model, x, compiled = Past().eval(), torch.randn(1, 2, WIDTH), []

    def compile(part: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        symbolic = [v for v in inputs if isinstance(v, Tensor) and v.dim() == 3 and not isinstance(v.shape[1], int)]
        if symbolic and any(node.target is torch.rsqrt for node in part.graph.nodes):
            compiled.append(bool(symbolic[0].shape[1] > 5))
        return part.forward

    def lengths(*given: int) -> tuple[Any, ...]:
        return (x, *(dynamic(past, 1) for past in pasts([*given])))

    cutter = run(model, lengths(7, 7, 3, 7, 3, 7), cutter=Cutter(compile))
    assert sizes_of(cutter.found[0])[0] >= LAYERS - 1
    assert sorted(compiled) == [False, True], "once for the long pasts, once for the short ones"
    run_again = torch.compile(model, backend=cutter)
    with torch.no_grad():
        run_again(*lengths(8, 8, 4, 9, 2, 6))
        assert len(cutter.found) == 1, "the guards hold"
        run_again(*lengths(8, 8, 4, 3, 2, 6))
        assert len(cutter.found) == 2, "a layer that shared the code for long pasts has a short one"
