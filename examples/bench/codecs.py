"""How far codes are from what they stand for: SmolLM2-135M-Instruct's own keys and values, each codec, no policy.

    python -P examples/bench/codecs.py [--tokens 600]

Squared error over squared size, mean over layers without the first and last two and tokens without the first four;
rotated by Hadamard matrices, one group a head. Prints a table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import smollm2
import torch
from kvpass.kernels.codecs.hadamard import rotated
from kvpass.kernels.codecs.registry import CODECS
from quality.prompts import Prompts
from quality.reference import call
from quality.shown import table
from transformers import DynamicCache

EDGE, SINKS = 2, 4


def error(name: str, x: torch.Tensor) -> float:
    """Of one layer's vectors [.., width]."""
    codec, turned, width = CODECS[name], rotated(x.float()), x.shape[-1]
    lost = turned - codec.decode(codec.encode(turned, width), width, width)
    return float(lost.square().sum() / turned.square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=600)
    tokens = parser.parse_args().tokens
    model, tokenizer = smollm2.load()
    ids = torch.tensor([Prompts(tokenizer, 0).plain(tokens, 0, 1)])[:, :tokens]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        call(model, ids, cache)
    layers = cache.layers[EDGE:-EDGE]
    width, rows = model.config.head_dim, []
    for name in (name for name in CODECS if "csr" not in name and "mixed" not in name):
        halves = [[getattr(layer, half)[..., SINKS:, :] for layer in layers] for half in ("keys", "values")]
        found = [sum(error(name, x) for x in half) / len(layers) for half in halves]
        rows.append([f"`{name}`", f"{8 * CODECS[name].bytes(width, width) / width:.2f}", *(f"{x:.5f}" for x in found)])
    print("\n".join(table(["codec", "bits", "keys", "values"], rows)))


if __name__ == "__main__":
    main()
