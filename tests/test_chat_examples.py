"""examples/chat.py and pipeline.py, with a tiny model: what they say is the model's, and their caches are a fifth."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import chat
import pipeline as pipeline_example
import pytest
import tiny_llama
import torch
from transformers import TextStreamer

import kvpass

ROOT = Path(__file__).resolve().parent.parent
SAID = [f"{'This is a long turn, to fill the cache. ' * 8}{at}" for at in range(3)]
PROMPT = "A prompt of some four hundred bytes, each a token of its own. " * 7


class Recorded(TextStreamer):
    """A streamer that keeps what it would print."""

    def __init__(self, tokenizer: object) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self.heard: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.heard.append(text)


def greedy(model: torch.nn.Module, ids: torch.Tensor, start: int) -> list[int]:
    """What the original model, without a cache, says at each place from `start` on, given all that stands before."""
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    return logits[0, start - 1 : -1].argmax(-1).tolist()


def test_a_chat_over_one_cache_says_what_the_original_says() -> None:
    model, tokenizer = tiny_llama.load()
    talk = chat.Chat(kvpass.compile(model, "full", inner="eager"), tokenizer)
    for words in SAID:
        before, streamer = (talk.text, talk.ids), Recorded(tokenizer)
        answer = talk.turn(words, streamer, new_tokens=12)
        asked = talk.text.removesuffix(answer).removeprefix(before[0])
        assert asked.endswith(f"<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n")
        fed = torch.cat([before[1], tokenizer(asked, return_tensors="pt").input_ids], dim=1)
        assert torch.equal(talk.ids[:, : fed.shape[1]], fed)
        said = talk.ids[0, fed.shape[1] :].tolist()
        assert said == greedy(model, talk.ids, fed.shape[1])
        assert 0 < len(said) <= 12
        assert "".join(streamer.heard).removesuffix("<|im_end|>").strip() == answer.strip()


def test_a_chat_evicts_in_every_turn() -> None:
    model, tokenizer = tiny_llama.load()
    talk = chat.Chat(kvpass.compile(model, "snapkv", 0.2, inner="eager"), tokenizer)
    for words in SAID:
        talk.turn(words, new_tokens=12)
        told = kvpass.report(talk.cache).to_dict()
        assert talk.ids.shape[1] - told["tokens"] in (0, 1)  # the last token is fed with the next turn
        assert told["bytes"] <= max(0.2, 64 / told["tokens"]) * 1.03 * told["dense_bytes"]
    assert told["tokens"] > 1000


def test_a_pipeline_evicts() -> None:
    model, tokenizer = tiny_llama.load()
    words, cache = pipeline_example.answer(kvpass.compile(model, "snapkv", 0.2, inner="eager"), tokenizer, PROMPT, 20)
    assert words
    told = kvpass.report(cache).to_dict()
    assert len(PROMPT) <= told["tokens"] <= len(PROMPT) + 19  # a random model may end early; its last token is not fed
    assert 0.18 * told["dense_bytes"] < told["bytes"] <= 0.206 * told["dense_bytes"]
    full, _ = pipeline_example.answer(kvpass.compile(model, "full", inner="eager"), tokenizer, PROMPT, 20)
    dense, _ = pipeline_example.answer(model, tokenizer, PROMPT, 20)
    assert full == dense


@pytest.mark.parametrize(
    ("command", "last"),
    [
        (["chat.py", "--tiny", "--new-tokens", "8", "--say", SAID[0], "--say", SAID[1]], " bytes of K and V, "),
        (["pipeline.py", "--tiny", "--new-tokens", "8"], "policy kvpass, budget 0.2"),
    ],
)
def test_the_example_runs_and_warns_of_nothing(command: list[str], last: str) -> None:
    script = [sys.executable, "-P", str(ROOT / "examples" / command[0]), *command[1:]]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert last in done.stdout
    foreign = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("kvpass")]
    assert not foreign, done.stderr
