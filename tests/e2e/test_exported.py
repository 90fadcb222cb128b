"""Exported decode steps, rewritten: the graph, the decomposed program and the MLIR code against the float64 oracle.

A prompt goes through the step token by token, then greedy tokens follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import exported, plain, tiny
from oracle.hf import Oracle
from oracle.plain import naive
from oracle.policies import EVICTING
from oracle.simulator import Simulator

import kvpass
from kvpass.lowering.exported import any_size
from kvpass.lowering.pure import decompositions

PROMPT, NEW, SLOTS = 38, 14, 36
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}

Step = Callable[..., Any]


def oracle(name: str, model: Any, policy: str, budget: Any) -> tuple[Simulator, Step]:
    """(simulator, next token's logits for ids [B, 1])."""
    if name == "llama":
        built = Oracle(model, policy, budget, floor=8)
        return built.simulator, built
    simulator = Simulator(policy, budget, floor=8)
    other, cache = naive(model, simulator), None

    def call(ids: torch.Tensor) -> torch.Tensor:
        nonlocal cache
        with torch.no_grad():
            logits, cache = other(ids, cache)
        return logits[:, -1]

    return simulator, call


def converse(name: str, model: Any, rewritten: Any, policy: Any, budget: Any, step: Step) -> Simulator:
    """Feed the same tokens to a step and to the oracle; compare kept positions and logits after each."""
    simulator, expected = oracle(name, model, policy, budget)
    prompt = (tiny if name == "llama" else plain).tokens(2, PROMPT)
    state, ids = rewritten.empty_state(PROMPT + NEW), prompt[:, :1]
    for t in range(PROMPT + NEW):
        logits, *state = step(ids, t, *state)
        want = expected(ids)
        simulator.follow(state[2::5])
        torch.testing.assert_close(logits[:, -1], want, **FLOAT32)
        ids = prompt[:, t + 1 : t + 2] if t + 1 < PROMPT else logits[:, -1].argmax(-1, keepdim=True)
    assert simulator.near_ties == 0
    return simulator


def small(policy: str) -> dict[str, Any]:
    """The preset with a budget of few slots, none of them out of reach by its own recent window."""
    return {**kvpass.Policy.load(policy).to_dict(), "min_slots": 8}


@pytest.mark.parametrize(
    ("name", "policy"), [("plain", "h2o"), ("grouped", "roco"), *(("llama", policy) for policy in EVICTING)]
)
@pytest.mark.some(3)
def test_graph_and_inlined_program_are_the_oracles(name: str, policy: str) -> None:
    model, program = exported.program(name)
    rewritten = kvpass.rewrite(program, small(policy), SLOTS)
    steps: list[Step] = [rewritten.graph_module]
    if name != "llama" or policy in ("h2o", "roco"):  # the others' words are inlined in them too, or in test_lower
        with any_size():
            inlined = rewritten.program.run_decompositions(decompositions())
        assert not any("kvpass" in str(n.target) for n in inlined.graph.nodes if n.op == "call_function")
        steps.append(inlined.module())
    for step in steps:
        simulator = converse(name, model, rewritten, policy, SLOTS, step)
        assert all(len(held) == SLOTS for row in simulator.kept(1) for held in row)


def test_a_fractional_budget_and_a_state_that_grows() -> None:
    model, program = exported.program("llama")
    rewritten = kvpass.rewrite(program, small("h2o"), 0.3)
    grown = []

    def step(ids: torch.Tensor, t: int, *state: torch.Tensor) -> Any:
        state = state if grown else tuple(rewritten.empty_state(1))
        (logits,), after = rewritten.step(ids, tokens=t, state=state)
        grown.append(after[0].shape[2])
        return logits, *after

    converse("llama", model, rewritten, "h2o", 0.3, step)
    assert grown[0] < grown[-1] < 0.5 * (PROMPT + NEW)


def test_full_budget_is_the_model() -> None:
    model, program = exported.program("plain")
    rewritten = kvpass.rewrite(program, "full")
    ids, state, logits = plain.tokens(2, 20), rewritten.empty_state(), []
    for t in range(20):
        (one,), state = rewritten.step(ids[:, t : t + 1], tokens=t, state=state)
        logits.append(one)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(logits, 1), model(ids)[0], **FLOAT32)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("plain", "h2o"),
        pytest.param("llama", "roco", marks=pytest.mark.wide),
        pytest.param("llama", "streaming_llm", marks=pytest.mark.wide),
    ],
)
def test_compiled_linalg_is_the_oracles(name: str, policy: str, tmp_path: Any) -> None:
    """The text that `export_mlir` writes, compiled by LLVM: no torch in the step."""
    pytest.importorskip("torch_mlir")
    from models.jit import Compiled

    model, program = exported.program(name)
    rewritten = kvpass.rewrite(program, small(policy), SLOTS)
    text = kvpass.export_mlir(rewritten, tmp_path / "step.mlir", dialect="linalg", ops="inline")
    compiled = Compiled(text)
    like = rewritten.graph_module(torch.ones(2, 1, dtype=torch.long), 0, *rewritten.empty_state(2))
    converse(name, model, rewritten, policy, SLOTS, lambda *args: compiled(args, like))
