"""`generate` with drafts: which tokens of its calls are tentative, so that it equals plain decoding."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from kvpass.model.asked import Asked, cache_in, length_of, prompt_in
from kvpass.policy.spec import Spec
from kvpass.runtime.drafts import Block, entered

SPECULATIVE = {
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "prompt lookup decoding",
    "assistant_early_exit": "self-speculative decoding",
    "is_assistant": "being the assistant of another model",
}
"""Arguments of `generate` by which tokens are taken back."""

SLACK = 16
"""Tokens by which an assistant's cache may be shortened beyond what it drafted: words that two tokenizers cut apart."""


def drafts_of(owner: Any, model: Any, args: Any, kwargs: dict[str, Any]) -> AbstractContextManager[None]:
    """The block for a call of `generate`; none where nothing is taken back, or can be without.

    A target takes back tokens of its last call only. Its prompt, which comes in one call with the first drafts, is
    settled in one piece, as without drafts. An assistant goes back over its rounds, and the prompt's last token.

    Args:
        owner: the compiled model's compilation.
        args, kwargs: of the call.
    """
    asked = Asked(model, kwargs)
    if not any(asked(name) for name in SPECULATIVE) or crops_by_itself(owner.backend.policy):
        return nullcontext()
    ids = prompt_in(args, kwargs)
    tokens = 1 if ids is None else ids.shape[1]  # what `generate` makes itself begins behind them
    if not asked("is_assistant"):
        return entered(Block(1, owner, tokens))
    depth = (asked("max_new_tokens") or asked("max_length") or 0) + SLACK
    return entered(Block(depth, owner, 0 if goes_on(kwargs) else tokens - 1))


def crops_by_itself(policy: Spec) -> bool:
    """Whether any token can be taken back of its caches without having been tentative."""
    return policy.keeps_all and not policy.layers and policy.store.k == policy.store.v == "dense"


def goes_on(kwargs: dict[str, Any]) -> bool:
    """Whether `generate` is given a cache that holds tokens."""
    return length_of(cache_in(kwargs)) > 0
