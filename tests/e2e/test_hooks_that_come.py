"""Hooks that come after the first call are part of the next one, however they come; those that leave are not."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from models import tiny
from spelling import cache_of
from torch import nn

import kvpass
from kvpass.model.hooks import Hooks

IDS = tiny.tokens(1, 24)


def doubled(module: Any, args: Any, out: Any) -> Any:
    return out * 2


def halved(module: Any, args: Any) -> Any:
    return (args[0] / 2,)


def keyword(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
    return out * 3


def backward(module: Any, *grads: Any) -> None:
    return None


@contextmanager
def registered(of: nn.Module, how: str, hook: Any, **more: Any) -> Iterator[None]:
    handle = getattr(of, how)(hook, **more)
    yield
    handle.remove()


@contextmanager
def inserted(of: nn.Module) -> Iterator[None]:
    of._forward_hooks[77] = doubled
    yield
    del of._forward_hooks[77]


def replaced(of: nn.Module) -> Any:
    return patch.object(of, "_forward_hooks", OrderedDict({5: doubled}))


@contextmanager
def put_in_place(parent: nn.Module, name: str) -> Iterator[None]:
    """A module with a hook in the place of one of its class, with the same parameters."""
    old = getattr(parent, name)
    other = copy.copy(old)
    other._forward_hooks = OrderedDict({5: doubled})
    setattr(parent, name, other)
    yield
    setattr(parent, name, old)


COMES: dict[str, Callable[[nn.Module, str], Any]] = {
    "forward": lambda parent, name: registered(getattr(parent, name), "register_forward_hook", doubled),
    "before": lambda parent, name: registered(getattr(parent, name), "register_forward_pre_hook", halved),
    "keywords": lambda parent, name: registered(
        getattr(parent, name), "register_forward_hook", keyword, with_kwargs=True
    ),
    "inserted": lambda parent, name: inserted(getattr(parent, name)),
    "replaced": lambda parent, name: replaced(getattr(parent, name)),
    "put in place": put_in_place,
}


@pytest.mark.parametrize("how", COMES)
def test_a_look_sees_it(how: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.SiLU()))
    hooks = Hooks(model)
    assert not hooks.any()
    for parent, name in ((model, "0"), (model[1], "1"), (model, "1")):
        with COMES[how](parent, name):
            assert hooks.any()
        assert not hooks.any()


def test_what_a_look_says_something_of() -> None:
    model, other = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    hooks = Hooks(model)
    assert not hooks.any()
    assert model[0]._forward_hooks in hooks
    assert model[0]._forward_pre_hooks_with_kwargs in hooks
    assert other._forward_hooks not in hooks
    assert model[0]._backward_hooks not in hooks
    with torch.no_grad():
        assert model[0]._backward_hooks in hooks
    model[0]._forward_hooks = OrderedDict()
    assert model[0]._forward_hooks not in hooks
    model.append(other)
    assert not hooks.any()
    assert other._forward_hooks in hooks


def test_scripted_modules_are_guarded() -> None:
    assert Hooks(nn.Sequential(torch.jit.script(nn.Linear(2, 2)))).any()


class Beside(nn.Module):
    """A model that keeps a module where `modules()` does not find it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.beside = model, [nn.Identity()]

    def forward(self, **given: Any) -> Any:
        out = self.model(**given)
        return self.beside[0](out.logits), cache_of(out)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=True)[0]


def test_calls_run_with_it_and_then_without() -> None:
    model = Beside(tiny.llama(layers=1)).eval()
    compiled = kvpass.compile(model, "full", inner="eager")
    plain = logits(model)
    torch.testing.assert_close(logits(compiled), plain)
    layer, graphs = model.model.model.layers[0], len(compiled.kvpass.graphs)
    ways = [
        COMES["before"](layer.mlp, "up_proj"),
        COMES["put in place"](layer.mlp, "down_proj"),
        COMES["forward"](layer.mlp, "act_fn"),
        registered(model.beside[0], "register_forward_hook", doubled),
    ]
    for way in ways:
        with way:
            want = logits(model)
            assert not torch.allclose(want, plain)
            torch.testing.assert_close(logits(compiled), want)
        torch.testing.assert_close(logits(compiled), plain)
    assert len(compiled.kvpass.graphs) == graphs + len(ways)  # without hooks, the first one again
    handle = layer.mlp.register_full_backward_hook(backward)
    torch.testing.assert_close(logits(compiled), plain)
    handle.remove()
