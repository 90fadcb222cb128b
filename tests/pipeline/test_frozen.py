"""Weights that are constants of compiled code: the graph with them, and the check that they are still the model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvpass.errors import ModelError
from kvpass.pipeline.frozen import Checked, weights_in, with_constants, without


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu()) + 1


def captured(model: Two, x: torch.Tensor) -> tuple[Any, list[Any]]:
    found: list[Any] = []
    torch._dynamo.reset()

    def note(gm: Any, inputs: list[Any]) -> Any:
        found.append((gm, inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=note)(x)
    return found[0]


def checked(model: Two, begins: bool = True) -> tuple[Callable[..., Any], list[Any]]:
    """A graph with both weights as constants, run node by node; and the inputs of a call."""
    gm, inputs = captured(model, torch.ones(1, 3))
    with torch.no_grad():
        weights = weights_in(gm, inputs)
    places = {at: weights[n] for at, n in enumerate(gm.graph.find_nodes(op="placeholder")) if n in weights}
    assert [*places.values()] == [model.first.weight, model.second.weight]
    constant = with_constants(gm, places)
    assert len(constant.graph.find_nodes(op="placeholder")) == len(inputs) - 2
    return Checked(without(constant.forward, places, len(inputs)), places, begins), inputs


def test_constants_compute_the_same() -> None:
    model, x = Two(), torch.randn(1, 3)
    call, inputs = checked(model)
    given = [x if type(one) is torch.Tensor else one for one in inputs]
    with torch.no_grad():
        torch.testing.assert_close(call(*given)[0], model(x), rtol=0, atol=0)


def in_place(model: Two) -> None:
    with torch.no_grad():
        model.second.weight.mul_(1.5)


def loaded(model: Two) -> None:
    model.load_state_dict({name: one * 2 for name, one in model.state_dict().items()})


def replaced(model: Two) -> None:
    model.first.weight = torch.nn.Parameter(model.first.weight.detach().clone())


def moved(model: Two) -> None:
    model.first.weight.data = model.first.weight.data.clone()


def through_data(model: Two) -> None:  # as adapters are merged; no version tells of it
    model.first.weight.data += 0.5


@pytest.mark.parametrize("change", [in_place, loaded, replaced, moved, through_data])
def test_what_was_frozen_is_what_is_given(change: Callable[[Two], None]) -> None:
    model = Two()
    call, inputs = checked(model)
    with torch.no_grad():
        call(*inputs)
        change(model)
        given = [model.first.weight if one is inputs[at] and at == first_at(inputs) else one
                 for at, one in enumerate(inputs)]  # fmt: skip
        with pytest.raises(ModelError, match="was changed or replaced") as caught:
            call(*given)
    assert "compile(model, ..) again" in caught.value.hint


def first_at(inputs: list[Any]) -> int:
    return next(at for at, one in enumerate(inputs) if isinstance(one, torch.nn.Parameter))


def test_gradients_freeze_nothing() -> None:
    gm, inputs = captured(Two(), torch.ones(1, 3))
    with pytest.raises(ModelError, match="gradients"), torch.enable_grad():
        weights_in(gm, inputs)
