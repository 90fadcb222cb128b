"""The model and the prompts of the vectors: the same numbers under any version of torch and transformers.

Imported by `make_vectors.py` in kvpress' environment and by `test_vectors.py` in kvpass'.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS = 192
"""Length of every prompt."""

HEADS = {"mha": (2, 2), "gqa": (6, 2)}
"""Query and KV heads: groups of 1 and of 3."""


def llama(shape: str, attention: str = "sdpa") -> Any:
    """A tiny llama of two layers. Weights are uniform, of standard deviation 0.2 (norms: around 1), so that attention
    is far from uniform.
    """
    heads, kv_heads = HEADS[shape]
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=heads * 16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        attn_implementation=attention,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = 2 * torch.rand(parameter.shape, generator=generator) - 1  # mt19937, 24 bits: the same everywhere
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.2 * 3**0.5 * noise)
    return model


def checksum(model: Any) -> float:
    """A number that tells whether two environments built the same model."""
    total = 0.0
    for name, parameter in sorted(model.named_parameters()):
        x = parameter.detach().double().flatten()
        total += float((x * torch.arange(1, len(x) + 1)).sum()) * (1 + zlib.crc32(name.encode()) % 97)
    return total


def prompt(seed: int, tokens: int = TOKENS) -> torch.Tensor:
    """Token ids 1 to 95 (96 is left for a delimiter), int64 [1, tokens]; no generator of any library is asked."""
    state, ids = seed * 2654435761 + 12345, []
    for _ in range(tokens):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append(1 + (state >> 33) % 95)
    return torch.tensor([ids])


def filters() -> torch.Tensor:
    """Directions for Q-Filters, as a trained file would hold them: float32 [layers, Hkv, D]."""
    return 2 * torch.rand(2, 2, 16, generator=torch.Generator().manual_seed(7)) - 1


def surrogate(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A projection of hidden states for KVzap: weights [layers, Hkv, size] and biases [layers, Hkv]."""
    noise = 2 * torch.rand(2, 2, size + 1, generator=torch.Generator().manual_seed(8)) - 1
    return noise[..., :-1], noise[..., -1]


def packed(positions: list[int]) -> str:
    """Ascending positions as a short text: `0-3,9,11-15`."""
    runs: list[list[int]] = []
    for p in positions:
        if runs and runs[-1][1] == p - 1:
            runs[-1][1] = p
        else:
            runs.append([p, p])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def unpacked(text: str) -> list[int]:
    """The inverse of `packed`."""
    runs = [[int(x) for x in part.split("-")] for part in text.split(",") if part]
    return [p for run in runs for p in range(run[0], run[-1] + 1)]
