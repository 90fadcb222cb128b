"""Answers in OpenAI's words: whole, or piece by piece."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """
    Attributes:
        chat: for /v1/chat/completions.
        fingerprint: of the policy: what else an answer depends on, beside the model.
        prompt, ready: tokens of the prompt, and how many of them a prefix had ready.
    """

    chat: bool
    model: str
    fingerprint: str
    prompt: int
    ready: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, reason: str, tokens: int) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return {**self._head(""), "choices": [choice], "usage": self._usage(tokens)}

    def piece(self, text: str, reason: str | None = None, first: bool = False) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text or first:
            delta["content"] = text
        said: dict[str, Any] = {"delta": delta} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return {**self._head(".chunk"), "choices": [choice]}

    def count(self, tokens: int) -> dict[str, Any]:
        """The last piece, where a count was asked for."""
        return {**self._head(".chunk"), "choices": [], "usage": self._usage(tokens)}

    def _head(self, kind: str) -> dict[str, Any]:
        name, prefix = (f"chat.completion{kind}", "chatcmpl-") if self.chat else ("text_completion", "cmpl-")
        known = {"id": prefix + self.id, "object": name, "created": self.created, "model": self.model}
        return {**known, "system_fingerprint": self.fingerprint}

    def _usage(self, tokens: int) -> dict[str, Any]:
        details = {"prompt_tokens_details": {"cached_tokens": self.ready}}
        whole = self.prompt + tokens
        return {"prompt_tokens": self.prompt, "completion_tokens": tokens, "total_tokens": whole, **details}


def sent(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


LAST = "data: [DONE]\n\n"
