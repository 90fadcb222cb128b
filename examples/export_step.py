"""One decode step, exported, rewritten and written as MLIR.

    python -P examples/export_step.py [FOLDER]

The decoder is that of plain_decoder.py. FOLDER (default: a temporary one) gets the four files.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

import kvpass

sys.path.insert(0, str(Path(__file__).resolve().parent))

from plain_decoder import HEADS, KV_HEADS, LAYERS, VOCABULARY, WIDTH, Decoder

TOKENS, BUDGET = 400, 0.2


class Step(nn.Module):
    """The decoder with its cache spread out, as torch.export and other compilers want it."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, k0: Tensor, v0: Tensor, k1: Tensor, v1: Tensor) -> tuple[Tensor, ...]:
        logits, cache = self.model(ids, [(k0, v0), (k1, v1)])
        return logits, *(t for pair in cache for t in pair)


def export(model: Decoder) -> torch.export.ExportedProgram:
    past = [torch.zeros(1, KV_HEADS, 5, WIDTH // HEADS) for _ in range(2 * LAYERS)]
    shapes = (None, *({2: Dim.DYNAMIC} for _ in past))
    return torch.export.export(Step(model), (torch.zeros(1, 1, dtype=torch.long), *past), dynamic_shapes=shapes)


@torch.no_grad()
def converse(model: Decoder, rewritten: Any) -> None:
    """The same random tokens through the model and through the rewritten step."""
    ids = torch.randint(VOCABULARY, (1, TOKENS))
    dense, cache = model(ids)
    state, agree = rewritten.empty_state(TOKENS), 0
    for t in range(TOKENS):
        (logits,), state = rewritten.step(ids[:, t : t + 1], tokens=t, state=state)
        agree += int(logits.argmax() == dense[:, t].argmax())
    whole = sum(x.nbytes for pair in cache for x in pair)
    held = sum(x.nbytes for at, x in enumerate(state) if at % 5 < 2)
    budget = rewritten.plan.policy.budget
    print(f"{TOKENS} tokens, budget {budget}: {agree / TOKENS:.0%} of the greedy choices are the ", end="")
    print(f"model's; {held:,} bytes of K and V, {whole:,} without kvpass: {held / whole:.1%}")


def write(rewritten: Any, folder: Path) -> None:
    for dialect in ("torch", "linalg"):
        for ops in ("inline", "custom"):
            path = folder / f"step_{dialect}_{ops}.mlir"
            text = kvpass.export_mlir(rewritten, path, dialect=dialect, ops=ops)
            code = re.sub(r"(?s)\{-#.*#-\}|dense(_resource)?<[^>]*>", "", text)  # without the weights
            named = len(re.findall(r'torch.operator "torch.kvpass|call @kvpass', text))
            known = len(re.findall(r"linalg\.(?!yield|index)\w+|torch\.aten\.\w+", code))
            print(f"{path.name}: {len(code):,} characters of code, {known} {dialect} ops, {named} of kvpass")


def main() -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    rewritten = kvpass.rewrite(export(model), "h2o", BUDGET)
    print(rewritten)
    print()
    for budget in (1.0, BUDGET):
        converse(model, kvpass.rewrite(export(model), "h2o", budget))
    print()
    with tempfile.TemporaryDirectory() as scratch:
        write(rewritten, Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch))


if __name__ == "__main__":
    main()
