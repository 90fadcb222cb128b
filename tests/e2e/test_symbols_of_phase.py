"""Conditions on sizes as arguments of attention: they become symbols at the second prompt's length, and are decided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.hosts import DIM, HEADS, LAYERS, Counted, Decoder, Pair
from torch import Tensor
from torch._dynamo.utils import counters

import kvpass

GRAPHS, BUDGET, SINKS = 4, 12, 4
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def longer_than_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)


def of_nano_vlm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q.shape[2]
    return F.scaled_dot_product_attention(q, k, v, is_causal=(t == k.size(2) and t > 1))


def by_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, None, 0.0, bool(q.size(-2) == k.size(-2)))


def joined_by_and(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    causal = (q.shape[2] > 1) & (q.shape[2] == k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def dropped_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0 * q.shape[2], is_causal=q.shape[2] != 1)


def branched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.shape[2] == k.shape[2] and q.shape[2] > 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v)


SPELLINGS = [longer_than_one, of_nano_vlm, by_place, joined_by_and, dropped_out, branched]


class Model(Counted):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend


def tokens(length: int, seed: int) -> Tensor:
    return torch.randint(0, 50, (1, length), generator=torch.Generator().manual_seed(seed))


def converse(model: Any, prompt: int, steps: int) -> tuple[Tensor, list[Pair]]:
    position, past, logits = 0, list[Pair](), []
    with torch.no_grad():
        for at in range(steps + 1):
            out, position, past = model(tokens(prompt if at == 0 else 1, at), position, past)
            logits.append(out[:, -1])
    return torch.stack(logits), past


def by_name(spelling: Any) -> str:
    return str(spelling.__name__)


@pytest.mark.parametrize("attend", SPELLINGS, ids=by_name)
@pytest.mark.some(3)
def test_the_models_numbers_in_few_graphs(attend: Attend) -> None:
    counters.clear()
    compiled = kvpass.compile(Model(attend).eval(), "full", inner="eager")
    for prompt, steps in ((30, 40), (37, 5), (41, 5)):
        found, _ = converse(compiled, prompt, steps)
        torch.testing.assert_close(found, converse(Model(attend).eval(), prompt, steps)[0], rtol=1e-4, atol=1e-5)
    assert len(compiled.kvpass.graphs) <= GRAPHS
    assert all(len(record.table.sites) == LAYERS for record in compiled.kvpass.graphs)
    assert not counters["graph_break"]


@pytest.mark.parametrize("attend", SPELLINGS[:3], ids=by_name)
def test_torch_compile_itself(attend: Attend) -> None:
    """In the other spelling nobody surrounds the calls."""
    compiled = torch.compile(Model(attend).eval(), backend=kvpass.backend("streaming_llm", BUDGET, inner="eager"))
    for prompt in (30, 37, 41):
        logits, past = converse(compiled, prompt, 3)
        expected, _ = converse(Model(attend).eval(), prompt, 0)
        torch.testing.assert_close(logits[:1], expected, rtol=1e-4, atol=1e-5)
        assert all(k.untyped_storage().nbytes() == 4 for k, _ in past)
        assert kvpass.report(past).to_dict()["slot_bytes"] == LAYERS * 2 * HEADS * (BUDGET + 1) * DIM * 4


@pytest.mark.parametrize("attend", SPELLINGS, ids=by_name)
@pytest.mark.some(3)
def test_keeps_what_the_policy_says(attend: Attend) -> None:
    compiled = kvpass.compile(Model(attend).eval(), "streaming_llm", BUDGET, inner="eager")
    for prompt, steps in ((30, 4), (37, 4)):
        length = prompt + steps
        kept = [*range(SINKS), *range(length - BUDGET + SINKS, length)]
        for layer in kvpass.inspect(converse(compiled, prompt, steps)[1]).layers:
            assert all(sorted(head.tolist()) == kept for row in layer.positions for head in row)


def test_others_are_compiled_as_ever() -> None:
    """During a call of ours and after it, a compilation by somebody else breaks at a symbolic condition as it did."""
    converse(kvpass.compile(Model(longer_than_one).eval(), "full", inner="eager"), 30, 1)
    counters.clear()

    def backend(gm: Any, inputs: Any) -> Any:
        return gm.forward

    other = torch.compile(longer_than_one, backend=backend, dynamic=True)
    from kvpass.pipeline.conditions import decided

    for length in (5, 7):
        with decided():
            other(*torch.randn(3, 1, 2, length, 8))
    assert counters["graph_break"]


def test_is_a_decoder() -> None:
    """The spellings are of one attention: the written-out one."""
    for attend in SPELLINGS:
        found = converse(Model(attend).eval(), 20, 3)[0]
        torch.testing.assert_close(found, converse(Model(Decoder.attend).eval(), 20, 3)[0], rtol=1e-4, atol=1e-5)
