"""What the operator chooses: the model, its policy, bytes, limits and prefixes. A request names none of them."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch

import kvpass
from serving.app import app
from serving.build import build
from serving.engine import Engine, Limits
from serving.lifecycle import Server, settings

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def size(text: str) -> int:
    """Bytes of `500MB`, `1.5GiB` or a number."""
    found = re.fullmatch(r"([0-9.]+)\s*([KMG]I?)?B?", text.strip().upper())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: say 500MB, 1.5GiB or a number of bytes")
    return int(float(found[1]) * UNITS[found[2] or ""])


def budget(text: str) -> Any:
    """A share (0.2), slots per KV head (1024), or `20% bytes`."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    plain = Limits()
    parser = argparse.ArgumentParser(prog="serve.py", description="An OpenAI-compatible server on one compiled model.")
    parser.add_argument("--model", help="a folder or a name on the hub (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--tiny", action="store_true", help="a small random model: says noise, starts at once")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", help="by which requests name the model (default: the model's last part)")
    parser.add_argument("--policy", default="snapkv", help="a policy's name or a YAML file")
    parser.add_argument("--budget", type=budget, default=0.25, help="a share, slots per KV head, or '20%% bytes'")
    parser.add_argument("--inner", default="eager", choices=["eager", "aot_eager", "inductor"])
    parser.add_argument("--kv-bytes", type=size, default="1GiB", help="that all caches may hold at any moment")
    parser.add_argument("--system", action="append", default=[], metavar="TEXT", help="a system message to keep ready")
    parser.add_argument("--prefix", action="append", default=[], type=Path, metavar="FILE", help="a beginning likewise")
    parser.add_argument("--rows", type=int, default=plain.rows, help="requests that generate together")
    parser.add_argument("--queue", type=int, default=plain.queue, help="requests that may wait")
    parser.add_argument("--seconds", type=float, default=plain.seconds, help="for a whole answer")
    parser.add_argument("--tokens", type=int, default=plain.tokens, help="of an answer, at most")
    parser.add_argument("--context", type=int, default=plain.context, help="tokens of prompt and answer, at most")
    parser.add_argument("--body", type=size, default=plain.body, help="bytes of a request, at most")
    parser.add_argument("--drain-seconds", type=float, default=30.0, help="for running answers after SIGTERM")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    return parser.parse_args(given)


def loaded(args: argparse.Namespace) -> tuple[Any, Any, str]:
    """(model, tokenizer, name)."""
    dtype = getattr(torch, args.dtype)
    if args.tiny:
        import tiny_llama

        model, tokenizer, name = *tiny_llama.load(), "tiny"
    elif args.model is None:
        import smollm2

        model, tokenizer, name = *smollm2.load(dtype), "smollm2-135m-instruct"
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
        tokenizer, name = AutoTokenizer.from_pretrained(args.model), Path(args.model).name
    return model.to(args.device, dtype), tokenizer, args.name or name


def engine_of(args: argparse.Namespace) -> tuple[Engine, Any, str]:
    """(engine, tokenizer, name of the model)."""
    model, tokenizer, name = loaded(args)
    keeps_all = kvpass.Policy.load(args.policy).keeps_all
    compiled = kvpass.compile(model, args.policy, None if keeps_all else args.budget, inner=args.inner)
    limits = Limits(args.rows, args.queue, args.seconds, args.tokens, args.context, args.body)
    texts = [path.read_text() for path in args.prefix]
    return build(compiled, tokenizer, args.kv_bytes, limits, args.system, texts), tokenizer, name


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    try:
        engine, tokenizer, name = engine_of(args)
    except (ValueError, OSError, kvpass.KVPassError) as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 1
    config = settings(app(engine, tokenizer, name), args.host, args.port)
    Server(config, engine, args.drain_seconds).run()
    engine.close()
    return 0
