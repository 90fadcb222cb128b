"""`kvpass.compile`: a model of the same class that shares every parameter and runs under a kvpass backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from kvpass.compiler import backend
from kvpass.errors import KVPassError
from kvpass.policy.spec import Policy
from kvpass.progress import tracing
from kvpass.twin import twin

if TYPE_CHECKING:
    from kvpass.patterns import PatternSet

M = TypeVar("M", bound=torch.nn.Module)

RECOMPILE_LIMIT = 64
"""Graphs per model before kvpass raises. Dynamo's own answer, running the model uncompiled, would drop the compressed
cache silently.
"""


def compile(
    model: M,
    policy: str | Policy | dict[str, Any] = "h2o",
    budget: int | float | None = None,
    *,
    inner: str = "inductor",
    debug: bool | str | None = None,
    strict: bool = True,
    verify: bool = False,
    patterns: PatternSet | None = None,
) -> M:
    """A model whose KV cache keeps only what the policy wants; `generate()` and calls with `past_key_values` work as
    before.

    Args:
        model: any nn.Module in eval mode. It is left alone; the result is of the same class and shares every parameter.
        policy: a built-in name (docs/policies.md), a path to a YAML file, a dict or a Policy. The default goes on with
            text most like the full cache does, for its bytes (docs/quality.md), and asks nothing of a model.
        budget: float: fraction of the tokens seen so far that each KV head keeps (never fewer than the policy's
            `min_slots`);
            int: slots per KV head. Sinks, recent and observation windows count inside it.
        inner: `inductor`, `aot_eager` or `eager`.
        debug: True or a folder: write the stages of every graph there (docs/debugging.md); None: the variable
            KVPASS_DEBUG decides.
        strict: raise if a site with a KV cache cannot be rewritten; else it stays dense and is reported.
        verify: on the first real inputs, compare each site at full budget with the unmodified subgraph.
        patterns: recognisers, `kvpass.patterns.DEFAULT.extended(...)` (docs/patterns.md); None for the default ones.

    Raises:
        PolicyError: at once, for a bad policy or budget.
        DeclinedError, TrainingError, CacheError: when the model is called.
    """
    chosen = backend(policy, budget, inner=inner, strict=strict, debug=debug, verify=verify, patterns=patterns)
    result = twin(model)
    result.compile(backend=chosen)
    result._compiled_call_impl = _never_uncompiled(result._compiled_call_impl)
    object.__setattr__(result, "kvpass", chosen)
    return result


def _never_uncompiled(call: Any) -> Callable[..., Any]:
    """Turn Dynamo's silent fall-back to the uncompiled model into an error."""
    import torch._dynamo

    settings: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT, "fail_on_recompile_limit_hit": True}
    if hasattr(torch._dynamo.config, "side_effect_replay_policy"):
        # else Dynamo takes a stack trace for each layer of the cache, for a log that nobody asked for
        settings["side_effect_replay_policy"] = "silent"

    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            with torch._dynamo.config.patch(**settings), tracing():
                return call(*args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise KVPassError(
                f"the model was recompiled more than {RECOMPILE_LIMIT} times",
                where=str(error).splitlines()[0],
                hint="pad batches and prompts to fewer shapes, or call torch._dynamo.reset()",
            ) from error

    return guarded
