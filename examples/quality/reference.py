"""The unmodified Hugging Face model on the plain texts: what every policy's likelihoods are compared with."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from spelling import with_cache
from transformers import DynamicCache

QUERIES = 16
"""Tokens of the true continuation whose attention to the prompt is added up."""


@dataclass(frozen=True)
class Reference:
    """Of the full cache, for every text. N texts, S steps, V words, L layers, H query heads, T prompt tokens.

    Attributes:
        prompt: `[N, T]` token ids.
        truth: `[N, S + 1]` the text's own continuation.
        greedy: `[N, S]` the full cache's continuation; its first token comes out of the prefill.
        truth_logp: `[N, S, V]` log-probabilities after each of the first S true tokens.
        greedy_logp: the same, after each greedy token.
        mass: `[N, L, H, T]` attention to each prompt position, as a share of all attention to the prompt,
            mean of QUERIES queries.
    """

    prompt: torch.Tensor
    truth: torch.Tensor
    greedy: torch.Tensor
    truth_logp: torch.Tensor
    greedy_logp: torch.Tensor
    mass: torch.Tensor


def call(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Log-probabilities after the last token, `[B, V]`; the cache goes on.

    The copy is of plain strides and no offset: Dynamo compiles anew for each other layout.
    """
    ids = ids.clone(memory_format=torch.contiguous_format)
    return model(ids, **with_cache(model, cache), logits_to_keep=1).logits[:, -1].float().log_softmax(-1)


def follow(model: Any, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Feeds the tokens one by one; `[B, S, V]` log-probabilities after each."""
    return torch.stack([call(model, tokens[:, i : i + 1], cache) for i in range(tokens.shape[1])], dim=1)


def go_on(model: Any, cache: Any, first: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy: the tokens fed, and log-probabilities after each."""
    tokens, logps, token = [], [], first[:, None]
    for _ in range(steps):
        tokens.append(token)
        logps.append(call(model, token, cache))
        token = logps[-1].argmax(-1, keepdim=True)
    return torch.cat(tokens, dim=1), torch.stack(logps, dim=1)


def attention_mass(model: Any, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    """`[B, L, H, T]`: see Reference.mass. Computed by the model's own eager attention, in one call."""
    length, chosen = cache.get_seq_length(), model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        rows = model(tokens, **with_cache(model, cache), logits_to_keep=1, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(chosen)
    prompt = [row[..., :length].float() for row in rows]
    return torch.stack([(row / row.sum(-1, keepdim=True)).mean(2) for row in prompt], dim=1)


def measure(model: Any, rows: torch.Tensor, steps: int) -> Reference:
    """`rows`: `[N, T + steps + 1]` tokens of real text."""
    prompt, truth = rows[:, : -steps - 1], rows[:, -steps - 1 :]
    cache = DynamicCache(config=model.config)
    first = call(model, prompt, cache).argmax(-1)
    mass = attention_mass(model, copy.deepcopy(cache), truth[:, :QUERIES])
    greedy, greedy_logp = go_on(model, copy.deepcopy(cache), first, steps)
    return Reference(prompt, truth, greedy, follow(model, cache, truth[:, :steps]), greedy_logp, mass)


def joined(parts: list[Reference]) -> Reference:
    return Reference(*(torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])))


def load_or_measure(path: Path, model: Any, chunks: list[torch.Tensor], steps: int) -> Reference:
    """From its file, or measured now in batches and written there."""
    if path.exists():
        return Reference(**torch.load(path))
    found = joined([measure(model, rows, steps) for rows in chunks])
    torch.save(vars(found), path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    return found
