"""What `generate` is asked for and a compressed cache cannot do yet: said by its own name before any work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvpass.errors import CacheError
from kvpass.pipeline.arguments import check_ready
from kvpass.policy.spec import Spec

_ONE_BY_ONE = "generate token by token, or compile with policy='full'"
_DYNAMIC = "leave cache_implementation out (a cache that grows), or say 'static'"

_SPECULATIVE = {
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "prompt lookup decoding",
    "assistant_early_exit": "self-speculative decoding",
    "is_assistant": "being the assistant of another model",
}

_STORES = {
    "paged": ("continuous batching keeps keys and values of all requests in one pool", _DYNAMIC),
    "quantized": ("a quantised cache re-reads and re-codes keys as data", _DYNAMIC),
    "offloaded": ("an offloaded cache moves keys between devices as data", _DYNAMIC),
}
"""Names of `cache_implementation` that no compressed cache can stand in for."""


def refuse_unserved(policy: Spec, model: Any, given: dict[str, Any]) -> None:
    """Refuse a `generate` call that would fail, or run dense, after the whole prompt.

    Args:
        given: the call's keyword arguments; what they leave out is taken from a generation config.

    Raises:
        CacheError: naming the feature.
        TrainingError: the model is in train mode: it may drop out, and leave its cache unused.
    """
    check_ready(model, "generate()", strict=False)
    asked = _Asked(model, given)
    if asked("output_attentions") and model.kvpass.strict:
        raise CacheError(
            "output_attentions=True does not work where attention is rewritten: its weights never exist as a whole",
            where="generate()",
            hint="call without it; kvpass.inspect(cache) shows what is kept, and by which scores; under strict=False "
            "the model runs dense",
        )
    for feature, why, fix in _unserved(policy, asked):
        raise CacheError(f"{feature} does not work on a compressed cache: {why}", where="generate()", hint=fix)


class _Asked:
    """One call's settings, by name."""

    def __init__(self, model: Any, given: dict[str, Any]) -> None:
        self.given = given
        self.configs = [c for c in (given.get("generation_config"), getattr(model, "generation_config", None)) if c]

    def __call__(self, name: str) -> Any:
        if name in self.given:
            return self.given[name]
        return next((value for c in self.configs if (value := getattr(c, name, None)) is not None), None)


def _unserved(policy: Spec, asked: _Asked) -> Iterator[tuple[str, str, str]]:
    for name, feature in _SPECULATIVE.items():
        if asked(name) and not policy.keeps_all:
            yield feature, "it takes tokens back, and they may have displaced others", _ONE_BY_ONE
    if asked("dola_layers") is not None:
        yield "DoLa decoding", "it reads hidden layers of an uncompiled pass", "generate greedily"
    store = asked("cache_implementation")
    kind = next((name for name in _STORES if str(store).startswith(name)), None)
    if kind is not None:
        why, fix = _STORES[kind]
        yield f"cache_implementation={store!r}", why, fix
    for name in ("cache", "past_key_values"):
        if getattr(asked.given.get(name), "offloading", False):
            yield f"a {type(asked.given[name]).__name__} with offloading", *_STORES["offloaded"]
        kinds = {cls.__name__ for cls in type(asked.given.get(name)).__mro__}
        for word in ("Quantized", "Paged"):
            if any(word in kind for kind in kinds):
                yield f"a {type(asked.given[name]).__name__}", _STORES[word.lower()][0], _DYNAMIC
