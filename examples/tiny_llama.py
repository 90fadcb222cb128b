"""A small random Llama and a tokenizer of bytes, for examples that are to run in seconds and without weights.

    model, tokenizer = load()

What it says is noise; its cache is as real as any.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Any:
    """A token for each byte, and the marks of a chat."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(letters)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    marks = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "<|pad|>"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, chat_template=TEMPLATE, **marks)


def load() -> tuple[Any, Any]:
    """(model in eval mode, tokenizer)."""
    torch.manual_seed(0)
    words = tokenizer()
    ids = {name: getattr(words, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 8192}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes, **heads, **ids)).eval(), words
