"""Compactor: keys that stand apart from the others, and those that their neighbours look at, whatever the question."""

from __future__ import annotations

import torch
from kvpass.kernels.rank.scorers.chance import gaussian
from kvpass.kernels.rank.scorers.registry import scorer
from kvpass.kernels.rank.scorers.seen import Seen
from kvpass.kernels.rank.smooth import smoothed
from torch import Tensor


@scorer("compactor", reads=("keys", "values", "queries", "layer", "own"))
def compactor(
    seen: Seen, sketch: int = 48, chunk: int = 256, blend: float = 0.35, sinks: int = 8, recent: int = 4
) -> Tensor:
    """blend * leverage + attention inside chunks, both as z-scores over heads and tokens (arXiv 2507.08143).

    Leverage: of unrotated, centred keys in a Gaussian sketch of `sketch` columns. Attention: of each `chunk` of tokens
    to itself, not causal, logits not scaled (kvpress), summed over queries, group mean, times ||v||_2, average of 3.
    The first `sinks` and the last `recent` tokens of a sequence take no part.
    """
    out = torch.zeros(seen.pos.shape, device=seen.pos.device)
    cos, sin = (x.expand(len(out), -1, -1)[:, None].float() for x in seen.angles)
    size = (cos.square() + sin.square()).clamp(min=1e-30)  # some models scale their rotations
    plain = (seen.keys * cos - _half_turned(seen.keys) * sin) / size
    queries = seen.queries * cos[:, :, None] + _half_turned(seen.queries) * sin[:, :, None]
    noise = gaussian(seen, plain.shape[-1], sketch) / sketch**0.5
    for b in range(len(out)):
        alive = seen.candidate[b, 0].nonzero().flatten()
        body = alive[sinks : len(alive) - recent]
        if len(body) < 2:
            continue
        apart = _leverage(plain[b, :, body], noise)
        heard = _heard(queries[b, :, :, body], seen.keys[b, :, body], chunk)
        heard = smoothed(heard * torch.linalg.vector_norm(seen.values[b, :, body], dim=-1), 3)
        out[b, :, body] = blend * _standard(apart) + _standard(heard)
    return out


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _leverage(keys: Tensor, sketch: Tensor) -> Tensor:
    """keys [Hkv, T, D], sketch [Hkv, D, s] -> x (X^T X + jitter)^-1 x^T for each row of X, [Hkv, T]."""
    rows = (keys - keys.mean(1, keepdim=True)) @ sketch
    square = rows.mT @ rows
    jitter, unit = 1e-2, torch.eye(square.shape[-1], device=square.device)
    lower, failed = torch.linalg.cholesky_ex(square + jitter * unit)
    while bool(failed.any()):
        jitter *= 10
        lower, failed = torch.linalg.cholesky_ex(square + jitter * unit)
    return (rows * torch.cholesky_solve(rows.mT, lower).mT).sum(-1).clamp(min=0)


def _heard(queries: Tensor, keys: Tensor, chunk: int) -> Tensor:
    """queries [Hkv, G, T, D], keys [Hkv, T, D] -> what each key hears inside its chunk, [Hkv, T]."""
    parts = zip(queries.split(chunk, 2), keys.split(chunk, 1), strict=True)
    return torch.cat([(q @ k[:, None].mT).softmax(-1).sum(2).mean(1) for q, k in parts], -1)


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std().clamp(min=1e-6)
