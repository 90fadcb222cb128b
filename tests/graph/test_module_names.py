"""Sites are named by the path of their module in the model, however Dynamo came by the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny
from torch import fx, nn

import kvpass
from kvpass.graph.module_names import module_path, named_path

LAYER = "model.layers.0.self_attn"


@pytest.mark.parametrize(
    "root",
    [
        "L['self']",
        "L['args'][0]",
        "L['kwargs']['model']",
        "L['fn'].__wrapped__.__self__",
        "L['fn'].__closure__[0].cell_contents",
        "L['fn'].__kwdefaults__['model']",
        "L['___stack0']",
        'L["self"]',
        "G['net']",
        "G['nets']['small'][1]",
        "G['__import_my_dot_module'].__self__",
    ],
)
def test_the_root_is_no_part_of_a_path(root: str) -> None:
    assert named_path(f"{root}.{LAYER}") == LAYER
    assert named_path(f"{root}.model._modules['layers']._modules['0'].self_attn") == LAYER
    assert named_path(root) == ""


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']._modules['model'].layers.0", "model.layers.0"),
        ("L['self'].__dict__['inner'].layers.0", "inner.layers.0"),
        ("getattr(L['self'], 'my-layers').0.attn", "my-layers.0.attn"),
        ("getattr(getattr(L['self'], 'a-b'), 'c-d')", "a-b.c-d"),
        ("L['self'].experts['en'].attn", "experts.en.attn"),
        ("L['self'].blocks[3].attn", "blocks[3].attn"),
        ("layers.0.attn", "layers.0.attn"),  # torch.export
        ("L.attn", "L.attn"),  # a module that is called L
        ("G", "G"),
        ("", ""),
    ],
)
def test_what_follows_the_root_stays(source: str, path: str) -> None:
    assert named_path(source) == path


def test_a_node_without_modules_has_no_path() -> None:
    assert module_path(fx.Graph().placeholder("x")) == ""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def handed_on(function: Callable[..., Any]) -> Callable[..., Any]:
    """What transformers' deprecate_kwarg does: the frame that Dynamo traces has `args`, no `self`."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Wrapped(Net):
    forward = handed_on(Net.forward)


NETS = {"small": [Net(), Wrapped()]}


def on_instance() -> nn.Module:
    net = Net()
    net.forward = handed_on(net.forward)  # type: ignore[method-assign]  # as accelerate's hooks do
    return net


@pytest.mark.parametrize("make", [Net, Wrapped, on_instance])
def test_modules(make: Callable[[], nn.Module]) -> None:
    assert paths(make()) == ["layers.0.attn", "layers.1.attn"]


def test_functions() -> None:
    net = Wrapped()
    assert paths(lambda x: net(x)) == ["layers.0.attn", "layers.1.attn"]
    assert paths(lambda x: NETS["small"][1](x)) == ["layers.0.attn", "layers.1.attn"]
    assert paths(lambda x: net.forward(x)) == ["layers.0.attn", "layers.1.attn"]


def paths(call: Any) -> list[str]:
    """Of the linears that Dynamo traces."""
    found: list[str] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.extend(module_path(n) for n in gm.graph.nodes if "linear" in str(n.target))
        return gm

    torch.compile(call, backend=backend)(torch.ones(1, 4))
    return found


def test_the_sites_of_a_transformers_model() -> None:
    """transformers 5.24 wraps every forward to rename arguments."""
    model, ids = tiny.llama(), tiny.tokens(1, 40)
    names = [f"model.layers.{i}.self_attn" for i in range(2)]
    compiled = kvpass.compile(model, "h2o", 0.5, inner="eager")
    with torch.no_grad():
        compiled(ids, use_cache=True)
    assert [site.name for site in compiled.kvpass.graphs[0].table.sites] == names
    text = str(kvpass.explain(model, input_ids=ids))
    assert all(f" {name} " in text for name in names)
