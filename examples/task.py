"""The demo's task: a fact hidden in real text, and a question at its end."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import smollm2

FACT = "The access code of the vault is 48213. Remember it."
QUESTION = "What is the access code of the vault? And what is the text above about?"
DEPTH = 0.6  # where in the text the fact stands
TOPIC = "naming"  # where the text starts: Python's documentation on names, scopes and exceptions
CHAT = 70  # tokens that the fact, the question and the chat's own marks take


def document(n_chars: int) -> str:
    start = sum(len(topics[name]) + 2 for name in sorted(topics) if name < TOPIC)
    return smollm2.text(n_chars, start)


def make_inputs(tokenizer: Any, n_tokens: int) -> dict[str, Any]:
    """Real text of about `n_tokens` with FACT hidden in it and QUESTION at its end, as a chat."""
    body = tokenizer(document(6 * n_tokens), add_special_tokens=False).input_ids[: n_tokens - CHAT]
    cut = int(len(body) * DEPTH)
    before, after = tokenizer.decode(body[:cut]), tokenizer.decode(body[cut:])
    chat = [{"role": "user", "content": f"{before}\n\n{FACT}\n\n{after}\n\n{QUESTION}"}]
    return dict(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True))
