"""A tiny llama with a tokenizer of its own, saved as users' models are, and a text for it."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from models.tiny import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(90)]


def text(words: int, seed: int = 0) -> str:
    """Words by chance: one is one token."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def saved(folder: Path) -> Path:
    """The folder, with weights, config and tokenizer in it."""
    table = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", *WORDS])}
    made = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="<s>"
    ).save_pretrained(folder)
    llama(layers=1, dtype=torch.float32).save_pretrained(folder)
    return folder
