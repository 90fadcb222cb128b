"""A chat with turns: one evicting cache for the whole conversation, answers printed as they come.

    python -P examples/chat.py [--tiny] [--policy kvpass] [--budget 0.2] [--say "a turn" --say "the next"]

SmolLM2-135M-Instruct, or with --tiny a small random model. Without --say, turns are read from the terminal until an
empty line. After each turn: tokens so far, and the bytes that their keys and values hold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

import kvpass

sys.path.insert(0, str(Path(__file__).resolve().parent))

from spelling import cache_of, with_cache


class Chat:
    """A conversation over one cache: each turn feeds only what is new.

    Attributes:
        ids: int64 [1, T], all tokens so far.
        text: what they say, the marks of the chat included.
        cache: keys and values of all of them but perhaps the last; None before the first turn.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.messages: list[dict[str, str]] = []
        self.ids, self.text, self.cache = torch.empty(1, 0, dtype=torch.long), "", None

    def turn(self, words: str, streamer: Any = None, new_tokens: int = 128) -> str:
        """Say something and return the answer, which the streamer gets word by word."""
        self.messages.append({"role": "user", "content": words})
        whole = self.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False)
        assert whole.startswith(self.text)
        new = self.tokenizer(whole[len(self.text) :], add_special_tokens=False, return_tensors="pt").input_ids
        prompt = torch.cat([self.ids, new], dim=1)
        given = with_cache(self.model, self.cache) if self.cache is not None else {}
        options = {"max_new_tokens": new_tokens, "do_sample": False, "return_dict_in_generate": True}
        seen = {"attention_mask": torch.ones_like(prompt), **given}
        out = self.model.generate(prompt, **seen, **options, streamer=streamer)
        self.cache, self.ids = cache_of(out), out.sequences
        if int(self.ids[0, -1]) == self.tokenizer.eos_token_id:  # not in the cache yet; the next turn opens with it
            self.ids = self.ids[:, :-1]
        answer: str = self.tokenizer.decode(self.ids[0, prompt.shape[1] :])
        self.text = whole + answer
        self.messages.append({"role": "assistant", "content": answer})
        return answer


def held(cache: Any) -> str:
    """One line on the cache."""
    told = kvpass.report(cache).to_dict()
    return f"[{told['tokens']} tokens, {told['bytes']:,} bytes of K and V, {told['dense_bytes']:,} without kvpass]"


def turns(said: list[str] | None) -> Iterator[str]:
    if said:
        yield from said
        return
    while words := input("> "):
        yield words


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small random model")
    parser.add_argument("--policy", default="kvpass", help="a policy's name or a YAML file")
    parser.add_argument("--budget", type=float, default=0.2, help="fraction of the tokens that is kept")
    parser.add_argument("--inner", default="eager", choices=["eager", "aot_eager", "inductor"])
    parser.add_argument("--new-tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--say", action="append", metavar="WORDS")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.tiny:
        from tiny_llama import load
    else:
        from smollm2 import load
    model, tokenizer = load()
    chat = Chat(kvpass.compile(model, policy=args.policy, budget=args.budget, inner=args.inner), tokenizer)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    for words in turns(args.say):
        if args.say:
            print(f"> {words}")
        chat.turn(words, streamer, args.new_tokens)
        print(held(chat.cache))


if __name__ == "__main__":
    main()
