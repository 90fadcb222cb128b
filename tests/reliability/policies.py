"""One tiny model under all built-in policies, and under others whose slots lie, hold and wait in other ways."""

from __future__ import annotations

import functools
from typing import Any

import torch
from bench.own_weights import with_files
from models import states, tiny
from spelling import with_cache
from transformers import DynamicCache

import kvpass
from kvpass.policy.load import names
from kvpass.policy.policy import Policy

VOCABULARY, BUDGET, WINDOW = 2048, 20, 6

OTHERS: dict[str, tuple[dict[str, Any], Any]] = {
    "h2o, int4": ({"extends": "h2o", "store": {"k": "int4", "v": "int4", "residual": 4, "sinks": 2}}, BUDGET),
    "ada_snapkv, int4": ({"extends": "ada_snapkv", "store": {"k": "int4", "v": "int4", "residual": 0, "sinks": 0}}, 24),
    "h2o, tiers": ({"extends": "h2o", "evicted": {"to": "int2"}}, BUDGET),
    "h2o, every 3": ({"extends": "h2o", "every": 3}, BUDGET),
    "ada_snapkv, every 3": ({"extends": "ada_snapkv", "every": 3}, 24),
    "h2o, calls": ({"extends": "h2o", "when": "calls"}, BUDGET),
    "h2o, a share": ({"extends": "h2o", "min_slots": 12}, 0.4),
}
BUILTIN = tuple(names())
NAMES = (*BUILTIN, *OTHERS)
CODED = ("h2o, int4", "h2o, tiers", "kivi")
"""Three that hold codes: of what stays, of what goes, and by a fit."""
FEW = ("h2o", "ada_snapkv", "h2o, every 3", "streaming_llm_reindexed", *CODED)
"""One for each way in which slots lie and change: compiling all takes longer than the examples."""


@functools.cache
def _model(layers: int) -> Any:
    made = tiny.llama(layers=layers)
    made.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    torch.nn.init.normal_(made.get_input_embeddings().weight, std=0.2)
    return made


def model_of(name: str) -> Any:
    """The model for a policy: of one layer, or of two where layers share or differ. With so many words that none comes
    twice in a conversation: keys of the same word have the same length.
    """
    policy = policy_of(name)[0]
    return _model(1 if policy.allocate.layers == "uniform" and not policy.layers else 2)


@functools.cache
def policy_of(name: str) -> tuple[Policy, Any]:
    """A policy whose windows are short enough for short conversations, and its budget."""
    if name in OTHERS:
        spec, budget = OTHERS[name]
        spec = {"name": "mine", "min_slots": 8, **_shorter(Policy.load(spec["extends"])), **spec}
        return Policy.load(spec), budget
    spec, found = with_files(name, states.weights(1, 64)), Policy.load(name)
    return Policy.load({**spec, "min_slots": 8, **_shorter(found)}), None if found.keeps_all else BUDGET


def _shorter(policy: Policy) -> dict[str, Any]:
    """Keys of a policy file that shorten what is longer than a short conversation."""
    spec: dict[str, Any] = {}
    protect = {"sinks": min(policy.protect.sinks, 4)}
    if isinstance(policy.protect.recent, int):
        protect["recent"] = min(policy.protect.recent, WINDOW)
    spec["protect"] = protect
    if isinstance(policy.observe.queries, int) and policy.observe.queries > WINDOW:
        spec["observe"] = {"queries": WINDOW}
    if policy.shortest > WINDOW:
        spec["shortest"] = WINDOW
    if policy.store.k != "dense" or policy.store.v != "dense":
        spec["store"] = {"residual": min(policy.store.residual, 4), "sinks": min(policy.store.sinks, 2)}
    return spec


@functools.cache
def compiled(name: str) -> Any:
    """The model under a policy, with all its graphs: those of prompts, steps and second prompts, of one row without a
    mask, and of several with one.
    """
    policy, budget = policy_of(name)
    made = kvpass.compile(model_of(name), policy, budget, inner="eager")
    for rows, masked in ((1, False), (2, True), (3, True)):
        cache, seen = DynamicCache(config=made.config), 0
        for count in (9 + rows, 1, 1, 5, 1, 7):
            seen, given = seen + count, {}
            if masked:
                mask = torch.ones(rows, seen, dtype=torch.long)
                given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1)[:, -count:]}
            with torch.no_grad():
                made(tiny.tokens(rows, count), **with_cache(made, cache), use_cache=True, **given)
    return made
