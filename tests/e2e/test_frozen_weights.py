"""`inner={"freezing": True}`: weights are constants of the code, values stay right, changed weights are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import tiny
from torch._dynamo.utils import counters

import kvpass
from kvpass.errors import ModelError

LAYERS = 3  # from three on layers are cut out of the graph
LINEARS = 7 * LAYERS + 1
FROZEN: dict[str, Any] = {"name": "inductor", "freezing": True}


def logits(compiled: Any, ids: torch.Tensor, steps: int = 3) -> torch.Tensor:
    out = compiled.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(list(out.logits))


@pytest.fixture(scope="module")
def frozen() -> tuple[Any, Any, int]:
    """A compiled model that has read a prompt and made steps, its model, and the weights that Inductor packed."""
    counters.clear()
    model = tiny.llama(4, 2, layers=LAYERS)
    compiled = kvpass.compile(model, "h2o", 0.4, inner=FROZEN)
    logits(compiled, tiny.tokens(1, 40))
    return model, compiled, counters["inductor"]["mkldnn_linear_weight_pack_matcher_count"]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch packs no weights")
def test_every_layers_weights_are_packed_and_values_right(frozen: Any) -> None:
    """Packed twice each: for the prompt's graph and for the step's."""
    model, compiled, packed = frozen
    assert packed == 2 * LINEARS
    ids = tiny.tokens(1, 40, seed=3)
    theirs = logits(kvpass.compile(model, "h2o", 0.4, inner="eager"), ids)
    torch.testing.assert_close(logits(compiled, ids), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.wide
def test_a_changed_weight_is_refused(frozen: Any) -> None:
    """Last of this file: the compiled model is of no use afterwards. Without freezing the change is followed."""
    model, compiled, _ = frozen
    ids = tiny.tokens(1, 40, seed=4)
    state = copy.deepcopy(model.state_dict())
    state["model.layers.2.self_attn.q_proj.weight"] *= 2
    first = logits(compiled, ids)
    follows = kvpass.compile(model, "h2o", 0.4, inner="eager")
    torch.testing.assert_close(logits(follows, ids), first, rtol=1e-4, atol=1e-4)
    model.load_state_dict(state)
    with pytest.raises(ModelError, match="a weight was changed or replaced"):
        logits(compiled, ids)
    assert (logits(follows, ids) - first).abs().max() > 0.1


def test_gradients_must_be_off() -> None:
    compiled = kvpass.compile(tiny.llama(4, 2).requires_grad_(False), "h2o", 0.4, inner=FROZEN)
    with pytest.raises(ModelError, match="cannot be frozen"):
        compiled(tiny.tokens(1, 20))
