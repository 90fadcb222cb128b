"""Merging policies through a compiled model: what a graph holds, generate, second turns, and hosts that cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvpass.patterns import DEFAULT
from models import plain, tiny
from models.graphs import capture
from models.turns import two_turns

import kvpass
from kvpass.lowering.lower import lower
from kvpass.plan.plan import plan
from kvpass.policy.policy import Policy
from kvpass.sites.scan import scan

PRESETS = {"merging": 48, "cam": 24, "d2o": 24, "kvmerger": 24, "elastic_cache": 40, "razor_attention": 40}


def spec(name: str, folder: Any) -> Any:
    if name == "kvmerger":  # random keys are not alike
        return {"name": "mine", "extends": name, "evicted": {"merge": {"threshold": -0.9}}}
    if name != "razor_attention":
        return name
    torch.save({"heads": torch.tensor([[1.0, 0.0], [0.2, 0.8]])}, folder / "heads.pt")
    return {"name": "mine", "extends": name, "allocate": {"file": str(folder / "heads.pt")}}


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.some(3)
def test_generate_in_two_turns(name: str, tmp_path: Any) -> None:
    """A padded batch: answers come, the budget holds, and merging changes what the model says, not before it must."""
    said = {}
    for how, policy in (("merge", spec(name, tmp_path)), ("drop", {"name": "mine", "extends": spec(name, tmp_path)})):
        if how == "drop":
            whole = policy["extends"]
            policy = {**(whole if isinstance(whole, dict) else {"name": "mine", "extends": whole}), "evicted": "drop"}
        model = kvpass.compile(tiny.one_llama(4, 2), policy, PRESETS[name], inner="eager")
        said[how], _ = two_turns(model)
    assert torch.isfinite(said["merge"]).all()
    assert torch.equal(said["merge"][0], said["drop"][0]), "the prompt's own logits come before anything goes"
    assert not torch.allclose(said["merge"], said["drop"], atol=1e-4)


CALLS = {"prefill": (20, None), "extend": (3, 20), "decode": (1, 20)}


@pytest.mark.parametrize("phase", list(CALLS))
def test_what_a_graph_holds(phase: str) -> None:
    """One op more in calls of several tokens; none where nothing is merged, where only steps merge, and in steps."""
    length, before = CALLS[phase]
    past = None if before is None else tuple((torch.randn(1, 2, before, 8), torch.randn(1, 2, before, 8)) for _ in "ab")
    gm = capture(plain.make(plain.GroupedDecoder), plain.tokens(1, length), past)
    for policy, merges in (("d2o", phase != "decode"), ("cam", False), ("h2o", False), ("layer_merging", False)):
        spec = {"name": policy, "extends": "layer_defensivekv", "evicted": "merge"} if policy[0] == "l" else policy
        made = plan(Policy.load(spec).with_budget(48), scan(gm, DEFAULT))
        names = [str(node.target) for node in lower(gm, made).gm.graph.nodes]
        assert names.count("kvpass.merge_slots.default") == 2 * merges
        assert all(("merge_slots" in site.ops) == merges for site in made.sites)
