"""A plain PyTorch decoder with a cat cache, compiled and run; tests start it in a fresh process, elsewhere.

    python -P decoder.py [--entry-point] [--block NAME ...]

Prints where kvpass came from, then `ok`.
"""

from __future__ import annotations

import argparse
import sys

parser = argparse.ArgumentParser()
parser.add_argument("--entry-point", action="store_true", help='torch.compile(backend="kvpass")')
parser.add_argument("--block", nargs="*", default=[], help="modules that cannot be imported")
args = parser.parse_args()
for name in args.block:
    sys.modules[name] = None  # type: ignore[assignment]

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

import kvpass  # noqa: E402


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(31, 32), nn.Linear(32, 96), nn.Linear(32, 31)

    def forward(self, ids, past):
        batch, length = ids.shape
        q, k, v = self.qkv(self.embed(ids)).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        seen = torch.arange(k.shape[2])[None] <= torch.arange(k.shape[2] - length, k.shape[2])[:, None]
        y = scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None])
        return self.out(y.transpose(1, 2).reshape(batch, length, 32)), (k, v)


def logits(call, ids):
    """Of a prompt of 20 tokens and five single steps."""
    past = (torch.zeros(2, 4, 0, 8), torch.zeros(2, 4, 0, 8))
    found = []
    for piece in (ids[:, :20], *ids[:, 20:].split(1, dim=1)):
        out, past = call(piece, past)
        found.append(out)
    return torch.cat(found, dim=1), past


def compiled(model, policy, budget):
    if args.entry_point:
        options = {"policy": policy, "budget": budget, "inner": "eager"}
        return torch.compile(model, backend="kvpass", options=options)
    return kvpass.compile(model, policy=policy, budget=budget, inner="eager")


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model, ids = Decoder().eval(), torch.randint(31, (2, 25))
    expected, _ = logits(model, ids)
    full, _ = logits(compiled(model, "full", None), ids)
    torch.testing.assert_close(full, expected)
    torch._dynamo.reset()
    evicted, cache = logits(compiled(model, "h2o", 8), ids)
    torch.testing.assert_close(evicted[:, :20], expected[:, :20])
    report = kvpass.report(cache).to_dict()
    assert report["dense_bytes"] == 2 * 2 * 4 * 25 * 8 * 4, report
    assert report["bytes"] < report["dense_bytes"] / 2, report
    kernels = [name for name in sys.modules if name.startswith("kvpass.kernels.") and "triton" in name]
    assert not kernels, kernels  # torch itself may import triton; on a CPU kvpass has no reason to
    print(kvpass.__file__)
    print("ok")


main()
