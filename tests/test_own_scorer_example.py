"""examples/own_scorer.py: a user's scorer, named in a policy file, keeps what a plain loop over its scores keeps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from own_scorer import POLICY, loud
from plain_decoder import HEADS, KV_HEADS, VOCABULARY, Decoder, rotate
from torch import Tensor

import kvpass

ROOT = Path(__file__).resolve().parent.parent
ORDER, SINKS, RECENT, FLOOR = 1.0, 4, 16, 32  # own_scorer.yaml, with a quarter of the tokens

Head = list[tuple[int, Tensor, Tensor]]
"""What a KV head holds: position, key, value."""


def kept_of(head: Head, seen: int) -> Head:
    n = max(FLOOR, seen // 4)
    loudness = [float(v.abs().sum()) for _, _, v in head]
    safe = [p < SINKS or p >= seen - RECENT for p, _, _ in head]
    best = sorted(range(len(head)), key=lambda i: (not safe[i], -loudness[i], head[i][0]))[:n]
    return [head[i] for i in sorted(best)]


def attend(block: torch.nn.Module, y: Tensor, heads: list[Head], start: int) -> tuple[Tensor, list[Head]]:
    """Attention of one layer over what its heads hold and the call's own tokens, head by head."""
    length = y.shape[0]
    q = rotate(block.q(y).view(1, length, HEADS, -1).transpose(1, 2), start)[0]
    k, v = block.kv(y).view(length, 2 * KV_HEADS, -1).transpose(0, 1).chunk(2)
    k = rotate(k[None], start)[0]
    out, grown = [], []
    for h in range(KV_HEADS):
        head = heads[h] + [(start + i, k[h, i], v[h, i]) for i in range(length)]
        keys, values = (torch.stack([slot[at] for slot in head]) for at in (1, 2))
        grown.append(head)
        for g in range(HEADS // KV_HEADS):
            logits = q[h * (HEADS // KV_HEADS) + g] @ keys.T / keys.shape[1] ** 0.5
            if start == 0:  # the model's own mask: causal in its first call, none later
                logits = logits.masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf)
            out.append(logits.softmax(-1) @ values)
    return block.out(torch.cat(out, -1)), [kept_of(head, start + length) for head in grown]


def naive(model: Decoder, ids: Tensor, state: list[list[Head]], start: int) -> Tensor:
    """One call: the logits; `state` then holds what is kept."""
    x = model.embed(ids[0])
    for at, block in enumerate(model.blocks):
        y, state[at] = attend(block, block.norm(x), state[at], start)
        x = x + y
        x = x + block.ff(block.ff_norm(x))
    return model.head(x)


@torch.no_grad()
def test_a_conversation_keeps_what_a_plain_loop_keeps():
    assert loud.__doc__
    model = Decoder().eval()
    quick = kvpass.compile(model, policy=POLICY, inner="eager")
    state: list[list[Head]] = [[[] for _ in range(KV_HEADS)] for _ in model.blocks]
    cache, start = None, 0
    for length in (200, *[1] * 30, 40, *[1] * 30):
        ids = torch.randint(VOCABULARY, (1, length))
        logits, cache = quick(ids, cache)
        torch.testing.assert_close(logits[0], naive(model, ids, state, start), atol=2e-4, rtol=2e-4)
        start += length
        for layer, heads in zip(kvpass.inspect(cache).layers, state, strict=True):
            held = [sorted(p for p in row if p >= 0) for row in layer.positions[0].tolist()]
            assert held == [[p for p, _, _ in head] for head in heads]
    assert start == 300
    assert len(state[0][0]) == 75


def test_the_example_runs():
    script = ROOT / "examples" / "own_scorer.py"
    done = subprocess.run([sys.executable, "-P", str(script)], capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "policy loud_values, budget 0.25" in done.stdout
    assert done.stdout.count(": 125 tokens, [0, 1, 2, 3, ") == 4
