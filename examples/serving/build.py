"""A model becomes an engine that serves it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import kvpass
from serving.admission import Admission, Need
from serving.app import chat_tokens
from serving.engine import Engine, Limits
from serving.metrics import Metrics
from serving.warm import warmed


def build(
    model: Any,
    tokenizer: Any,
    kv_bytes: int,
    limits: Limits,
    systems: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> Engine:
    """
    Args:
        model: what `kvpass.compile` returned; from here on only the engine calls it.
        kv_bytes: that all caches may hold at any moment.
        systems, texts: system messages of chats, and beginnings of other prompts, that are computed once.

    Raises:
        ValueError: the policy cannot serve several requests together, or the bytes are too few for any.
        kvpass.KVPassError: the model has layers that are not compressed.
    """
    beginnings = [chat_tokens(tokenizer, [{"role": "system", "content": text}], False) for text in systems]
    beginnings += [tokenizer(text).input_ids for text in texts]
    cache, prefixes = warmed(model, beginnings)
    base = kvpass.Cache.held(prefixes.caches, overhead=True)
    admission = Admission(cache.bounds(), kv_bytes, base)
    if not admission.can_ever(Need((1,), 1)):
        least = admission.alone(Need((1,), 1))
        raise ValueError(
            f"the shortest request needs {least:,} bytes of cache ({base:,} for prefixes), of {kv_bytes:,}"
        )
    own = getattr(model.config, "max_position_embeddings", limits.context)
    limits, metrics = replace(limits, context=min(limits.context, own)), Metrics()
    metrics.budget.set(kv_bytes)
    return Engine(model, ends_of(model, tokenizer), admission, prefixes, limits, metrics)


def ends_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer."""
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(said if isinstance(said, list) else [said])}
    return frozenset(token for token in found if token is not None)


def wait_until(ready: Any, seconds: float = 60.0) -> None:
    """Raises TimeoutError if a function of no argument does not become true."""
    over = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > over:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.01)
