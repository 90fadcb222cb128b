"""What `generate` is asked for and a compressed cache cannot do yet: said by its own name before any work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvpass.errors import CacheError
from kvpass.model.asked import Asked, cache_in, parts_of
from kvpass.model.speculative import SPECULATIVE, crops_by_itself, goes_on
from kvpass.pipeline.arguments import check_ready
from kvpass.policy.spec import Spec

_ONE_BY_ONE = "generate without drafts, or compile with policy='full'"
_DYNAMIC = "leave cache_implementation out (a cache that grows), or say 'static'"

_STORES = {
    "paged": ("continuous batching keeps keys and values of all requests in one pool", _DYNAMIC),
    "quantized": ("a quantised cache re-reads and re-codes keys as data", _DYNAMIC),
    "offloaded": ("an offloaded cache moves keys between devices as data", _DYNAMIC),
}
"""Names of `cache_implementation` that no compressed cache can stand in for."""


def refuse_unserved(policy: Spec, model: Any, given: dict[str, Any]) -> None:
    """Refuse a `generate` call that would fail, or run dense, after the whole prompt.

    Args:
        given: the call's arguments by name.

    Raises:
        CacheError: naming the feature.
        TrainingError: the model is in train mode: it may drop out, and leave its cache unused.
    """
    check_ready(model, "generate()", strict=False)
    asked = Asked(model, given)
    if asked("output_attentions") and model.kvpass.strict:
        raise CacheError(
            "output_attentions=True does not work where attention is rewritten: its weights never exist as a whole",
            where="generate()",
            hint="call without it; kvpass.inspect(cache) shows what is kept, and by which scores; under strict=False "
            "the model runs dense",
        )
    for feature, why, fix in _unserved(policy, asked):
        raise CacheError(f"{feature} does not work on a compressed cache: {why}", where="generate()", hint=fix)


def _unserved(policy: Spec, asked: Asked) -> Iterator[tuple[str, str, str]]:
    for what, why in () if crops_by_itself(policy) else _undrafted(asked):
        yield what, why, _ONE_BY_ONE
    if asked("dola_layers") is not None:
        yield "DoLa decoding", "it reads hidden layers of an uncompiled pass", "generate greedily"
    store = asked("cache_implementation")
    kind = next((name for name in _STORES if str(store).startswith(name)), None)
    if kind is not None:
        why, fix = _STORES[kind]
        yield f"cache_implementation={store!r}", why, fix
    for cache in parts_of(cache_in(asked.given)):
        if getattr(cache, "offloading", False):
            yield f"a {type(cache).__name__} with offloading", *_STORES["offloaded"]
        kinds = {cls.__name__ for cls in type(cache).__mro__}
        for word in ("Quantized", "Paged"):
            if any(word in kind for kind in kinds):
                yield f"a {type(cache).__name__}", _STORES[word.lower()][0], _DYNAMIC


def _undrafted(asked: Asked) -> Iterator[tuple[str, str]]:
    """Ways of drafting whose calls cannot be taken apart into steps."""
    if asked("use_mtp"):
        yield "multi-token prediction (use_mtp)", "its layers have a cache of their own, which reads the model's"
    if type(asked.given.get("assistant_model")).__name__.startswith(("Gemma4Assistant", "Gemma4UnifiedAssistant")):
        yield "an assistant that has no cache of its own", "it reads the model's keys as data"
    if not any(asked(name) for name in SPECULATIVE):
        return
    if goes_on(asked.given) and not asked("is_assistant"):
        yield "drafting over a cache of earlier turns", "transformers gives the model their tokens once more"
    if asked.given.get("inputs_embeds") is not None:
        yield "inputs_embeds with drafted tokens", "transformers gives the model no drafts beside them"
    static = "static" in str(asked("cache_implementation")) and not asked("max_cache_len")
    if static and asked("prompt_lookup_num_tokens"):
        yield "prompt lookup over a preallocated cache", "transformers drafts beyond its end: say max_cache_len"
    if getattr(asked.config, "is_encoder_decoder", False):
        yield "drafted tokens of an encoder-decoder model", "its calls are not taken apart yet"
    if _forgetful(asked.config):
        yield "drafting over sliding-window or recurrent layers", "transformers holds their past until the crop"
    if asked("output_attentions"):
        yield "output_attentions with drafted tokens", "the steps that they are tried in do not keep attention"


def _forgetful(config: Any) -> bool:
    """Whether some layers of a transformers model keep less than all tokens by themselves."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return getattr(text, "sliding_window", None) is not None
    return any(kind != "full_attention" for kind in kinds)
