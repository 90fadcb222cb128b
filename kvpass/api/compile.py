"""`kvpass.compile`: the same model, entered by another door, which runs under a kvpass backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from kvpass.pipeline.arguments import check_model, check_ready
from kvpass.pipeline.entry import backend
from kvpass.policy.policy import Policy

if TYPE_CHECKING:
    from kvpass.patterns import PatternSet

M = TypeVar("M", bound=torch.nn.Module)


def compile(
    model: M,
    policy: str | Policy | dict[str, Any] = "kvpass",
    budget: int | float | str | None = None,
    *,
    inner: str | Mapping[str, Any] = "inductor",
    debug: bool | str | PathLike[str] | None = None,
    strict: bool = True,
    verify: bool = False,
    patterns: PatternSet | None = None,
    mode: str = "default",
) -> M:
    """A model whose KV cache keeps only what the policy wants; `generate()` and calls with `cache=` work as before
    (`past_key_values=` with transformers before 5.24).

    The result is the same model, entered by another door: an instance of its class that shares its modules, weights,
    hooks and settings, so what is changed on either is changed on both. Calls of the result, of its `forward`, and of
    any module reached through it run under kvpass; the model itself runs as before. What calls change in the model's
    attributes (caches, counters) is not shared. Copies and pickles of the result are compiled likewise.

    Args:
        model: any nn.Module in eval mode. One that was compiled already (`torch.compile(model)`, or by kvpass) is taken
            out of its wrapper.
        policy: a built-in name (docs/policies.md), a path to a YAML file, a dict or a Policy. The default, `kvpass`,
            reads a prompt once and of such policies finds the most of it again (docs/design/0022); it holds a prompt's
            dense keys and values until its last layer, `h2o` and `snapkv` one layer's.
        budget: float: fraction of the tokens seen so far that each KV head keeps (never fewer than the policy's
            `min_slots`);
            int: slots per KV head; str: `"20% bytes"` of what an unmodified cache holds, everything counted. Sinks,
            recent and observation windows count inside it.
        inner: `inductor`, `aot_eager` or `eager`; or a mapping of a `name` and options, which Inductor alone takes:
            `{"name": "inductor", "freezing": True}` (docs/inner.md).
        debug: True or a folder: write the stages of every graph there (docs/debugging.md); None: the variable
            KVPASS_DEBUG decides.
        strict: raise if a site with a KV cache cannot be rewritten; else it stays dense and is reported.
        verify: on the first real inputs, compare each site at full budget with the unmodified subgraph.
        patterns: recognisers, `kvpass.patterns.DEFAULT.extended(...)` (docs/patterns.md); None for the default ones.
        mode: `default`, or `reduce-overhead`: on a CUDA device, a call of one token is recorded as a CUDA graph and
            replayed (docs/gpu.md); `kvpass.report` counts such steps, and says why others were not. Elsewhere it
            changes nothing.

    Raises:
        ModelError, TrainingError, PolicyError: at once, for what is no model, a model in train mode or with hooks of
            accelerate, a bad policy, budget or option.
        DeclinedError, TrainingError, CacheError: when the model is called.
        RecompileError: likewise, after 64 graphs; it names the reason for the last one.

    Warns:
        NothingRewritten: once, after the first call of a model without a cache to rewrite.
    """
    from kvpass.model.compilation import Compilation
    from kvpass.model.facade import uncompiled
    from kvpass.runtime.sharded import sharded

    bare = uncompiled(model)
    check_model(bare, "kvpass.compile")
    chosen = backend(
        policy, budget, inner=inner, strict=strict, debug=debug, verify=verify, patterns=patterns, mode=mode
    )
    check_ready(bare, "kvpass.compile", strict)
    result: M = Compilation(bare, replace(chosen, part=sharded(bare))).root
    return result
