"""From a captured graph to a rewritten one: golden texts, what must not change, and what verify() catches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kvpass.patterns import DEFAULT
from models import golden, plain
from models.attention import attend, hidden, layer, past
from models.graphs import capture, dynamic
from models.styles import gpt_fast, style
from torch import fx

import kvpass
from kvpass.errors import VerificationError
from kvpass.graph.calls import example
from kvpass.lowering.lower import Lowered, lower
from kvpass.plan.plan import Plan, plan
from kvpass.policy.policy import Policy
from kvpass.proof.verify import verify
from kvpass.sites.scan import scan


class OneLayer(plain.GroupedDecoder):
    def __init__(self) -> None:
        super().__init__(layers=1)


def cache(length: int) -> Any:
    return ((torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)),)


CALLS = {"prefill": (20, None), "extend": (3, 20), "decode": (1, 20)}


def graph(phase: str) -> fx.GraphModule:
    length, before = CALLS[phase]
    return capture(plain.make(OneLayer), plain.tokens(1, length), None if before is None else cache(before))


def rewritten(gm: fx.GraphModule, policy: str = "snapkv", budget: Any = 0.2) -> tuple[Plan, Lowered]:
    made = plan(Policy.load(policy).with_budget(budget), scan(gm, DEFAULT))
    return made, lower(gm, made)


@pytest.mark.parametrize("phase", CALLS)
def test_golden(phase):
    gm = graph(phase)
    made, lowered = rewritten(gm)
    parts = {
        "sites": str(scan(gm, DEFAULT)),
        "plan": str(made),
        "captured": golden.code(gm, "sdpa cat"),
        "rewritten": golden.code(lowered.gm, ""),
    }
    golden.check(f"lower_{phase}", "\n\n".join(f"== {title}\n{text}" for title, text in parts.items()))


@pytest.mark.parametrize("phase", CALLS)
def test_the_captured_graph_is_not_modified(phase):
    gm = graph(phase)
    before = [(golden.line(n), dict(n.meta)) for n in gm.graph.nodes]
    made, lowered = rewritten(gm)
    verify(gm, lowered, made)
    after = [(golden.line(n), dict(n.meta)) for n in gm.graph.nodes]
    assert [text for text, _ in before] == [text for text, _ in after]
    assert all(a.keys() == b.keys() for (_, a), (_, b) in zip(before, after, strict=True))


@pytest.mark.parametrize("phase", CALLS)
def test_state_comes_last_and_the_cache_does_not_come_out(phase):
    gm = graph(phase)
    _, lowered = rewritten(gm)
    old, new = ([n for n in g.graph.nodes if n.op == "placeholder"] for g in (gm, lowered.gm))
    assert [n.name for n in new[: len(old)]] == [n.name for n in old]
    assert [n.name for n in new[len(old) :]] == [f"kvpass_0_{name}" for name in ("k", "v", "pos", "stats", "cursor")]
    assert lowered.outputs == 3
    assert len(next(iter(reversed(lowered.gm.graph.nodes))).args[0]) == 1
    (binding,) = lowered.bindings
    assert sorted(at for half in binding.returned for at in half) == [1, 2]
    assert (binding.past is None) == (phase == "prefill")


@pytest.mark.parametrize("phase", CALLS)
def test_new_nodes_tell_where_they_come_from(phase):
    _, lowered = rewritten(graph(phase))
    made = [n for n in lowered.gm.graph.nodes if "site" in n.meta.get("kvpass", {}) and n.op != "placeholder"]
    assert made
    assert all(n.meta["kvpass"]["site"] == "blocks.0" and "plain.py" in n.meta["stack_trace"] for n in made)


def test_lengths_are_read_off_a_stand_in():
    """k.shape[2] after the cat: with dynamic sizes it is a node, and stays right over many calls."""

    def forward(self, x, cache):
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        y = self.finish(attend(q, k, v))
        return y * 0 + k.shape[2] + v.size(2) + k.shape[1] * 1000, (k, v)

    gm = capture(layer(forward), hidden(), tuple(dynamic(t, 2) for t in past()))
    made, lowered = rewritten(gm, "h2o", 8)
    verify(gm, lowered, made)
    model = kvpass.compile(layer(forward), "h2o", 8, inner="eager")
    with torch.no_grad():
        cache = model(hidden(20), past(0))[1]
        for length in range(21, 27):
            y, cache = model(hidden(), cache)
            assert y.unique().tolist() == [2000 + 2 * length]
    assert kvpass.report(cache).to_dict()["tokens"] == 26


def test_weights_are_shared():
    gm = graph("decode")
    _, lowered = rewritten(gm)
    assert {id(p) for p in lowered.gm.parameters()} <= {id(p) for p in gm.parameters()}


def broken(change: Callable[[fx.Graph, dict[str, fx.Node]], None], phase: str = "decode") -> None:
    gm = graph(phase)
    made, lowered = rewritten(gm)
    verify(gm, lowered, made)
    change(lowered.gm.graph, {n.name: n for n in lowered.gm.graph.nodes})
    verify(gm, lowered, made)


def call_of(nodes: dict[str, fx.Node], op: str) -> fx.Node:
    return next(n for n in nodes.values() if op in str(n.target))


def drop_an_op(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    graph.erase_node(call_of(nodes, "compact_slots"))


def add_an_op(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    op = call_of(nodes, "decode_attend")
    with graph.inserting_after(op):
        graph.node_copy(op, lambda n: n)


def read_the_past(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    shell = next(n for n in nodes.values() if n.op == "placeholder" and "cache" in n.name)
    with graph.inserting_before(call_of(nodes, "decode_attend")):
        graph.call_method("sum", (shell,))


def lose_a_fake(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    del call_of(nodes, "decode_attend").meta["example_value"]


def lose_an_output(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    nodes["output"].args = ((),)


def change_a_stranger(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    next(n for n in nodes.values() if getattr(n.target, "__name__", "") == "gelu").target = torch.relu


@pytest.mark.parametrize(
    ("change", "phase", "rule"),
    [
        (drop_an_op, "prefill", "those of the plan"),
        (add_an_op, "decode", "those of the plan"),
        (read_the_past, "decode", "nothing reads a past cache"),
        (lose_a_fake, "decode", "carry their fake value"),
        (lose_an_output, "decode", "every output"),
        (change_a_stranger, "decode", "outside the sites are untouched"),
    ],
)
def test_verify_catches(change, phase, rule):
    with pytest.raises(VerificationError, match=rule):
        broken(change, phase)


def test_verify_catches_one_output_for_two_caches():
    gm = graph("decode")
    made, lowered = rewritten(gm)
    (binding,) = lowered.bindings
    twice = replace(lowered, bindings=(replace(binding, returned=((1,), (1,))),))
    with pytest.raises(VerificationError, match="two caches"):
        verify(gm, twice, made)


def test_sites_of_other_shapes_in_one_graph():
    """Fakes are shared between equal sites only."""

    def forward(self, x, wide, narrow):
        q, k, v = self.project(x)
        k1, v1 = torch.cat([wide[0], k], 2), torch.cat([wide[1], v], 2)
        y1 = attend(q, k1, v1)
        q, k, v = (t[:, :, :, :4].half() for t in (q, k, v))
        k2, v2 = torch.cat([narrow[0], k], 2), torch.cat([narrow[1], v], 2)
        return y1, attend(q, k2, v2), (k1, v1), (k2, v2)

    narrow = tuple(t[..., :4].half() for t in past(7))
    gm = capture(layer(forward), hidden(), past(), narrow)
    made, lowered = rewritten(gm)
    verify(gm, lowered, made)
    outs = [example(n) for n in lowered.gm.graph.nodes if "decode_attend" in str(n.target)]
    assert [(tuple(t.shape), t.dtype) for t in outs] == [
        ((2, 4, 1, 8), torch.float32),
        ((2, 4, 1, 4), torch.float16),
    ]


def test_a_mask_that_sites_share_leaves_their_fakes_right():
    """Over buffers only the first site cuts the mask: the others have fewer nodes."""
    model = style.make(gpt_fast.Transformer).init_cache(1, 16)
    gm = capture(model, plain.tokens(1, 5), torch.arange(5))
    _, lowered = rewritten(gm)
    nodes = lowered.gm.graph.nodes
    assert len([n for n in nodes if "kvpass.written" in str(n.target)]) == 1
    outs = [example(n) for n in nodes if "prefill_attend" in str(n.target)]
    assert len(outs) > 1
    assert len({str([tuple(t.shape) for t in found]) for found in outs}) == 1


MASKS: dict[str, Callable[[Any, int], Any]] = {
    "new_ones": lambda logits, end: logits.new_ones(end, end).tril().bool()[-logits.shape[2] :],
    "ones_like": lambda logits, end: torch.ones_like(logits).tril(end - logits.shape[2]).bool(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", MASKS)
def test_a_mask_of_the_type_of_the_logits(spelling: str, dtype: torch.dtype) -> None:
    """The logits are gone; what was made of their type (and size) alone is made of another tensor."""

    def forward(self: Any, x: Any, cache: Any = None) -> Any:
        q, k, v = self.project(x)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        logits = (q @ k.repeat_interleave(2, 1).mT).float()
        if x.shape[1] > 1:
            shown = MASKS[spelling](logits, k.shape[2])
            logits = logits.masked_fill(~shown, torch.finfo(logits.dtype).min)
        return self.finish(torch.softmax(logits, -1).to(v.dtype) @ v.repeat_interleave(2, 1)), (k, v)

    model, turns = layer(forward).to(dtype), [hidden(n).to(dtype) for n in (6, 1, 3, 4, 1)]
    compiled = kvpass.compile(layer(forward).to(dtype), "full", inner="eager")
    near = {} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.01}  # the probabilities are rounded on their own
    with torch.no_grad():
        ours = theirs = None
        for x in turns:
            found, ours = compiled(x, ours)
            expected, theirs = model(x, theirs)
            torch.testing.assert_close(found, expected, **near)
