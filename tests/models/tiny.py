"""Small random transformers models. Their weights are large, so that attention is far from uniform and scores are
far from tied."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""Of a config, for models that no function below makes."""


def llama(heads: int = 4, kv_heads: int = 2, head_dim: int = 16, layers: int = 2, **extra: Any) -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=heads * head_dim,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=8192,
        initializer_range=0.2,
        attn_implementation="sdpa",
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        **extra,
    )
    return LlamaForCausalLM(config).eval()


@functools.cache
def one_llama(*args: Any, **kwargs: Any) -> Any:
    """The same object for the same arguments, for tests that share traces (`one_trace`) and change nothing in it."""
    return llama(*args, **kwargs)


def gpt2(attention: str) -> Any:
    torch.manual_seed(1)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": 97}
    plain = {"attn_implementation": attention, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**size, **plain, initializer_range=0.2)).eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them the padding token."""
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask) of rows with these numbers of real tokens."""
    width = max(lengths)
    ids = tokens(len(lengths), width, seed)
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    return ids * mask, mask
