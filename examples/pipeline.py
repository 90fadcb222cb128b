"""`transformers.pipeline` over a compiled model: nothing of the pipeline changes, and the cache evicts.

    python -P examples/pipeline.py [--tiny] [--policy kvpass] [--budget 0.2]

SmolLM2-135M-Instruct, or with --tiny a small random model. A pipeline makes a cache of its own for each prompt; given
one, it fills that, and the caller can look at it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from transformers import DynamicCache, pipeline

import kvpass

sys.path.insert(0, str(Path(__file__).resolve().parent))

from smollm2 import text
from spelling import with_cache


def answer(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> tuple[str, Any]:
    """What a pipeline over the model writes, and the cache that it filled."""
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    cache = DynamicCache()
    options = {"max_new_tokens": new_tokens, "do_sample": False, "return_full_text": False}
    (out,) = write(prompt, **with_cache(model, cache), **options)
    return str(out["generated_text"]), cache


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small random model")
    parser.add_argument("--policy", default="kvpass", help="a policy's name or a YAML file")
    parser.add_argument("--budget", type=float, default=0.2, help="fraction of the tokens that is kept")
    parser.add_argument("--inner", default="eager", choices=["eager", "aot_eager", "inductor"])
    parser.add_argument("--new-tokens", type=int, default=64)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.tiny:
        from tiny_llama import load
    else:
        from smollm2 import load
    model, tokenizer = load()
    compiled = kvpass.compile(model, policy=args.policy, budget=args.budget, inner=args.inner)
    words, cache = answer(compiled, tokenizer, text(600 if args.tiny else 4000), args.new_tokens)
    print(words)
    print(kvpass.report(cache))


if __name__ == "__main__":
    main()
