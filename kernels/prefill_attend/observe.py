"""The second pass of prefill_attend: what each key got of the observed rows. Pure torch.

With the saved log-sum-exp a probability is one exponential, so a tile of rows and keys is recomputed, reduced and
forgotten. Scale and log-sum-exp ride in the matmul: [q * scale, -lse] @ [k, 1] is the logarithm of the probability.
With a soft cap the log-sum-exp is subtracted after the tanh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from kvpass.kernels.attention.observation import EVEN, Observation, emission, emitted
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.rule import Rule
from torch import Tensor

ROWS, KEYS = 384, 1024
"""Rows (queries times group) and keys of a tile: 1.5 MiB of float32, within a core's L2. Measured with D = 64."""

_SHARED = {"important", "last"}
"""Statistics of queries that give a key at least an even share."""

NEVER = 1e30
"""A log-sum-exp that makes every probability 0; finite, because a matmul may multiply it by zero."""


@dataclass(frozen=True)
class Piece:
    """Query rows rows[0]:rows[1] and key columns cols[0]:cols[1] of batch rows batch."""

    batch: slice
    rows: tuple[int, int]
    cols: tuple[int, int]
    kind: str
    """causal: row i sees columns up to i (rows and cols are the same span). full: everything. bias: see the mask."""


class _Head(NamedTuple):
    """The watched rows of one KV head in one piece."""

    queries: Tensor
    """float32 [G, r, D + 1]"""
    keys: Tensor
    """float32 [D + 1, c]"""
    bias: Tensor | None
    """float32 [1 or G, 1 or r, 1 or c]"""
    offset: int | None
    """causal: row i sees keys up to i + offset; None: not causal."""
    softcap: float
    position: int
    """Of the first row's query."""


def observe(
    piece: Piece,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    softmax: Softmax,
    watched: Tensor,
    rule: Rule,
    stats: Tensor,
    start: int,
) -> None:
    """Add the statistics of a piece's watched rows to stats [N, B, Hkv, L].

    q, k whole; lse float32 [b, Hq, rows] and bias (or None) [1|b, 1|Hkv, 1|G, 1|rows, 1|cols] of the piece; watched
    bool [B, S]; start: position of the call's first query.
    """
    (top, bottom), (left, right) = piece.rows, piece.cols
    watched = watched[piece.batch, top:bottom]
    rows = watched.any(0).nonzero()
    if not len(rows):
        return
    low, high = int(rows[0]), int(rows[-1]) + 1
    watched = watched[:, low:high]
    heads = k.shape[1]
    columns = lse[:, :, low:high].masked_fill(~watched[:, None], NEVER)[..., None]
    queries = torch.cat([q[piece.batch, :, top + low : top + high].float() * softmax.factor, -columns], -1)
    queries = queries.view(len(queries), heads, -1, *queries.shape[2:])
    keys = k[piece.batch, :, left:right].float().mT
    if bias is not None and bias.shape[3] > 1:
        bias = bias[:, :, :, low:high]
    offset = low if piece.kind == "causal" else None
    target = stats[:, piece.batch, :, left:right]
    for b in range(len(queries)):
        for h in range(heads):
            one = None if bias is None else bias[min(b, len(bias) - 1), min(h, bias.shape[1] - 1)]
            full = torch.cat([keys[b, h], keys.new_ones(1, right - left)])
            _add(
                _Head(queries[b, h], full, one, offset, softmax.softcap, start + top + low),
                watched[b],
                rule,
                target[:, b, h],
            )


def _add(head: _Head, watched: Tensor, rule: Rule, target: Tensor) -> None:
    """Add one head's statistics to target [N, c], tile by tile."""
    group, rows = head.queries.shape[:2]
    step = max(1, ROWS // group)
    shares = _even_shares(head, rows, target.shape[-1]) if _SHARED & set(emitted(rule)) else None
    tile = head.queries.new_empty(step * group * min(KEYS, target.shape[-1]))
    for i in range(0, rows, step):
        j = min(i + step, rows)
        block = head.queries[:, i:j].reshape(-1, head.queries.shape[-1])
        seen = target.shape[-1] if head.offset is None else head.offset + j
        for x in range(0, seen, KEYS):
            y = min(x + KEYS, seen)
            probs = tile[: len(block) * (y - x)].view(len(block), y - x)
            _fill(probs, head, block, (i, j), (x, y))
            even = None if shares is None else shares[i:j]
            _reduce(probs.view(group, j - i, y - x), rule, target[:, x:y], even, head.position + i)
    if "count" in emitted(rule):
        target[emission(rule, "count")] += _counts(head, watched, target.shape[-1])


def _fill(probs: Tensor, head: _Head, block: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> None:
    """Probabilities of one tile, 0 where hidden; probs is a scratch [G * r, c]."""
    (i, j), (x, y) = rows, cols
    if head.softcap:
        torch.mm(block[:, :-1], head.keys[:-1, x:y], out=probs)
        torch.add(block[:, -1:], probs.tanh_(), alpha=head.softcap, out=probs)
    else:
        torch.mm(block, head.keys[:, x:y], out=probs)
    grouped = probs.view(-1, j - i, y - x)
    if head.bias is not None:
        bias = head.bias if head.bias.shape[1] == 1 else head.bias[:, i:j]
        grouped.add_(bias if bias.shape[2] == 1 else bias[:, :, x:y])
    probs.exp_()
    if head.offset is not None and y > i + head.offset:
        edge = max(i + head.offset, x)
        grouped[..., edge - x :].tril_(i + head.offset - edge)


def _reduce(probs: Tensor, rule: Rule, target: Tensor, shares: Tensor | None, position: int) -> None:
    """Add the tile [G, r, c] to the float statistics [N, c]; changes the tile.

    shares [r]: of `_even_shares`, for `important` and `last`; position: of the first row's query.
    """
    weight = 1.0 / len(probs) if rule[Observation].group == "mean" else 1.0
    if rule[Observation].group == "mean" and not {"sumsq", *_SHARED} & set(emitted(rule)):
        if "sum" in emitted(rule):
            target[emission(rule, "sum")].add_(probs.sum((0, 1)), alpha=weight)
        return
    row = probs.sum(0) if rule[Observation].group == "mean" else probs.amax(0)
    for index, name in enumerate(emitted(rule)):
        if name == "sum":
            target[index].add_(row.sum(0), alpha=weight)
        elif name == "sumsq":
            target[index].add_((row * row).sum(0), alpha=weight * weight)
        elif shares is not None and name in _SHARED:
            hit = row * weight >= shares[:, None]
            if name == "important":
                target[index].add_(hit.sum(0))
            else:
                newest = torch.arange(position + 1, position + 1 + len(hit), device=hit.device)[:, None] * hit
                target[index].copy_(torch.maximum(target[index], newest.amax(0)))


def _counts(head: _Head, watched: Tensor, keys: int) -> Tensor:
    """How many watched rows see each key: float32 [c]."""
    votes = watched.float()
    if head.bias is not None:
        shown = (head.bias > float("-inf")).any(0).float()
        shown = shown.expand(len(votes), keys)
        return votes @ shown
    if head.offset is None:
        return votes.sum().expand(keys)
    later = votes.flip(0).cumsum(0).flip(0)  # rows from i on; key offset + i is seen by exactly those
    return torch.cat([later[:1].expand(head.offset), later, later.new_zeros(keys)])[:keys]


def _even_shares(head: _Head, rows: int, keys: int) -> Tensor:
    """`EVEN` / keys that each row sees, float32 [r]; an evenly attending query gives each key that much."""
    if head.bias is not None:
        seen = (head.bias > float("-inf")).any(0).expand(rows, keys).sum(-1)
    elif head.offset is not None:
        seen = head.offset + 1 + torch.arange(rows, device=head.queries.device)
    else:
        seen = torch.full((rows,), keys, device=head.queries.device)
    return EVEN / seen.clamp(min=1)
