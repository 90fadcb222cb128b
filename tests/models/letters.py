"""A tokenizer with one token for each character."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class Letters:
    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        return SimpleNamespace(input_ids=[ord(letter) % 96 + 1 for letter in text])

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i - 1) for i in ids)

    def apply_chat_template(self, chat: list[dict[str, str]], **_: Any) -> str:
        before = "".join(f"<{turn['role']}>{turn['content']}" for turn in chat[:-1])
        return f"{before}<user>{chat[-1]['content']}<assistant>"
