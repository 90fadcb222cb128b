"""A decoder in plain PyTorch, no transformers, whose own KV cache starts to evict without a change to the model.

    python -P examples/plain_decoder.py

The model knows nothing of kvpass: rotary positions, grouped heads, a cache of tuples grown by torch.cat.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvpass

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS = 512, 128, 2, 8, 2
PROMPT, NEW = 500, 300

Cache = list[tuple[Tensor, Tensor]]


def rotate(x: Tensor, start: int) -> Tensor:
    """Rotary embedding of x [B, H, S, D] at positions start, start + 1, ..."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half) / half)
    angle = torch.arange(start, start + x.shape[2])[:, None] * frequency
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        head = WIDTH // HEADS
        self.q, self.kv = nn.Linear(WIDTH, HEADS * head), nn.Linear(WIDTH, 2 * KV_HEADS * head)
        self.out, self.norm, self.ff_norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.ff = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, length, _ = x.shape
        start = 0 if past is None else past[0].shape[2]
        y = self.norm(x)
        q = self.q(y).view(batch, length, HEADS, -1).transpose(1, 2)
        k, v = self.kv(y).view(batch, length, 2 * KV_HEADS, -1).transpose(1, 2).chunk(2, dim=1)
        q, k = rotate(q, start), rotate(k, start)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.ff(self.ff_norm(x)), (k, v)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        for block in self.blocks:  # untrained: make its attention pick, and its tokens vary
            nn.init.normal_(block.q.weight, std=0.3)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        x, grown = self.embed(ids), []
        for layer, block in enumerate(self.blocks):
            x, pair = block(x, None if cache is None else cache[layer])
            grown.append(pair)
        return self.head(x), grown


@torch.no_grad()
def generate(model: nn.Module, prompt: Tensor, count: int) -> tuple[list[int], Cache]:
    """Greedy: `count` tokens after a prompt [1, S], and the cache."""
    ids, cache, tokens = prompt, None, []
    for _ in range(count):
        logits, cache = model(ids, cache)
        ids = logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    return tokens, cache


def main() -> None:
    torch.manual_seed(0)
    model, prompt = Decoder().eval(), torch.randint(VOCABULARY, (1, PROMPT))
    print("What kvpass sees in the first call:\n")
    print(kvpass.explain(model, prompt, policy="h2o", budget=0.2))

    expected, dense = generate(model, prompt, NEW)
    whole = sum(t.nbytes for pair in dense for t in pair)
    print()
    for budget in (1.0, 0.2):
        tokens, cache = generate(kvpass.compile(model, policy="h2o", budget=budget, inner="eager"), prompt, NEW)
        same = sum(a == b for a, b in zip(tokens, expected, strict=True))
        held = kvpass.report(cache).to_dict()["bytes"]
        print(f"budget={budget}: {same} of {NEW} tokens equal the model's; ", end="")
        print(f"{held:,} bytes of K and V held, {whole:,} without kvpass: {held / whole:.1%}")
    print()
    print(kvpass.report(cache))


if __name__ == "__main__":
    main()
