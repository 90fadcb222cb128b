"""Slots with biases through a compiled model: Attention Matching, and the slot that counts, in generate and graphs."""

from __future__ import annotations

from typing import Any

import pytest
import smollm2
import torch
from kvpass.kernels.slots.bias import BIAS
from kvpass.patterns import DEFAULT
from models import plain, tiny
from models.graphs import capture
from models.turns import GREEDY, two_turns
from oracle.ops import Site
from spelling import cache_of

import kvpass
from kvpass.lowering.lower import lower
from kvpass.plan.plan import plan
from kvpass.plan.rule import rule_of
from kvpass.policy.policy import Policy
from kvpass.runtime.shell import find
from kvpass.sites.scan import scan

ONE = {"into": "one_slot", "halves": "both", "weight": "even"}
POLICIES: dict[str, tuple[Any, Any, int | float]] = {
    "am_fast": ("am_fast", {"name": "mine", "extends": "am_fast", "evicted": {"refit": None}}, 48),
    "am_fast, growing": (
        {"name": "mine", "extends": "am_fast", "min_slots": 44},
        {"name": "mine", "extends": "am_fast", "min_slots": 44, "evicted": {"refit": None}},
        0.6,
    ),
    "on ada_snapkv": (
        {"name": "mine", "extends": "ada_snapkv", "evicted": "refit"},
        {"name": "mine", "extends": "ada_snapkv"},
        48,
    ),
    "a slot that counts": (
        {"name": "mine", "extends": "streaming_llm", "evicted": {"merge": {**ONE, "bias": "count"}}},
        {"name": "mine", "extends": "streaming_llm", "evicted": {"merge": ONE}},
        24,
    ),
}


def biases(cache: Any) -> list[torch.Tensor]:
    """Of the slots in use, layer by layer."""
    states = [find(layer.keys).state for layer in cache.layers]
    return [state[BIAS][state.pos >= 0] for state in states]


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("name", list(POLICIES))
def test_generate_in_two_turns(name: str) -> None:
    """A padded batch: answers come, some slots have biases, and they change what the model says, not before it must."""
    said, held = {}, {}
    policy, other, budget = POLICIES[name]
    for how, spec in (("with", policy), ("without", other)):
        model = kvpass.compile(tiny.one_llama(4, 2), spec, budget, inner="eager")
        said[how], held[how] = two_turns(model)
    assert torch.isfinite(said["with"]).all()
    assert torch.equal(said["with"][0], said["without"][0]), "the prompt's own logits come before anything goes"
    assert not torch.allclose(said["with"], said["without"], atol=1e-4)
    assert all(bool((layer != 0).any()) for layer in biases(held["with"]))


def test_a_budget_for_all_changes_nothing() -> None:
    """Where nothing goes, am_fast says what the unmodified model says."""
    ids, mask = tiny.left_padded([50, 41])
    model = tiny.one_llama(4, 2)
    asked = {**GREEDY, "max_new_tokens": 12, "output_logits": True}
    want = model.generate(ids, attention_mask=mask, **asked)
    got = kvpass.compile(model, "am_fast", 512, inner="eager").generate(ids, attention_mask=mask, **asked)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-5)
    assert not any(bool(layer.any()) for layer in biases(cache_of(got)))


CALLS = {"prefill": (20, None), "extend": (3, 20), "decode": (1, 20)}


@pytest.mark.parametrize("phase", list(CALLS))
def test_what_a_graph_holds(phase: str) -> None:
    """One op more in calls of several tokens. Attention is told of biases where there are slots before the call."""
    length, before = CALLS[phase]
    past = None if before is None else tuple((torch.randn(1, 2, before, 8), torch.randn(1, 2, before, 8)) for _ in "ab")
    gm = capture(plain.make(plain.GroupedDecoder), plain.tokens(1, length), past)
    made = plan(Policy.load("am_fast").with_budget(48), scan(gm, DEFAULT))
    nodes = {str(node.target): node for node in lower(gm, made).gm.graph.nodes}
    assert ("kvpass.refit_slots.default" in nodes) == (phase != "decode")
    assert all(("refit_slots" in site.ops) == (phase != "decode") for site in made.sites)
    for name in ("prefill_attend", "window_rows", "refit_slots"):
        if phase != "decode":
            assert ("bias" in nodes[f"kvpass.{name}.default"].kwargs) == (phase == "extend"), name


@pytest.mark.model
def test_smollm2_is_answered_more_exactly() -> None:
    """Attention of the prompt's last queries over what stays, against attention over all: the fit is nearer than plain
    eviction by the same score, in nearly every head, and by far in the mean.
    """
    model, tokenizer = smollm2.load(layers=2)
    ids = tokenizer(smollm2.text(3000), return_tensors="pt").input_ids[:, :480]
    seen: list[tuple[torch.Tensor, ...]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((q.detach(), k[:, :: q.shape[1] // 3] if k.shape[1] == q.shape[1] else k, v))
        return attend(q, k, v, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        model(ids)
    errors: dict[str, list[float]] = {"fit": [], "exact fit": [], "drop": []}
    for q, k, v in seen:
        v = v[:, :: q.shape[1] // 3] if v.shape[1] == q.shape[1] else v
        for name, evicted in (("fit", {}), ("exact fit", {"refit": {"ridge": 0.0}}), ("drop", {"refit": None})):
            spec = {"name": "mine", "extends": "am_fast", "evicted": evicted}
            site = Site(rule_of(Policy.load(spec).with_budget(96), 0, 2), torch.zeros(1), (64, 64))
            causal = torch.ones(480, 480, dtype=torch.bool).tril()[None, None]
            whole = site.many(q, k, v, causal, 0)
            errors[name] += [_error(site, q, whole, head) for head in range(3)]
    fit, exact, drop = (torch.tensor(errors[name]) for name in errors)
    assert len(fit) == 6
    assert int((fit < drop).sum()) >= 5, (fit, drop)
    assert float(fit.mean()) < 0.6 * float(drop.mean()), (fit, drop)
    assert float(exact.mean()) < 0.5 * float(drop.mean()), (exact, drop)


def _error(site: Site, q: torch.Tensor, whole: torch.Tensor, head: int) -> float:
    """Of a head's outputs for the last 256 queries, relative to their size: float64 attention over its slots."""
    state, own = site.state, slice(3 * head, 3 * head + 3)
    held = state.pos[0, head] >= 0
    at = state.pos[0, head, held]
    logits = q[0, own, -256:].double() @ state.k[0, head, held].double().T / 8
    logits = logits + (state[BIAS][0, head, held] if hasattr(state, BIAS) else 0.0)
    logits = logits.masked_fill(at > torch.arange(224, 480)[:, None], float("-inf"))
    off = logits.softmax(-1) @ state.v[0, head, held].double() - whole[0, own, -256:].double()
    return float(off.square().sum().sqrt() / whole[0, own, -256:].double().square().sum().sqrt())
