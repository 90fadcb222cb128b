"""A scorer of your own: a torch function, registered by name, that a policy file ranks slots by.

    python -P examples/own_scorer.py

The decoder is that of plain_decoder.py, the policy is own_scorer.yaml. Without a model, from the command line:

    kvpass policies check examples/own_scorer.yaml --import examples/own_scorer.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

import kvpass

sys.path.insert(0, str(Path(__file__).resolve().parent))

from plain_decoder import VOCABULARY, Decoder

POLICY = Path(__file__).resolve().parent / "own_scorer.yaml"


@kvpass.scorer("loud", reads=("values",), pointwise=True)
def loud(seen: kvpass.Seen, order: float = 2.0) -> Tensor:
    """The norm of a token's value: what is loud stays."""
    norm: Tensor = torch.linalg.vector_norm(seen.values, ord=order, dim=-1)
    return norm


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = kvpass.compile(Decoder().eval(), policy=POLICY, inner="eager")
    logits, cache = model(torch.randint(VOCABULARY, (1, 400)), None)
    for _ in range(100):
        logits, cache = model(logits[:, -1:].argmax(-1), cache)
    print(kvpass.report(cache))
    for at, layer in enumerate(kvpass.inspect(cache).layers):
        for head, positions in enumerate(layer.positions[0].tolist()):
            kept = sorted(p for p in positions if p >= 0)
            print(f"layer {at}, KV head {head}: {len(kept)} tokens, {kept[:8]} ... {kept[-3:]}")


if __name__ == "__main__":
    main()
