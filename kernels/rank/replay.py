"""replay_scores: what a prompt that is read again looks at (KVzip, arXiv 2505.23416; docs/design/0021). Pure torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from kvpass.kernels.attention.memory import softmax_of
from kvpass.kernels.attention.visibility import Sees, Shown
from kvpass.kernels.rank.places import Protected, key_places
from kvpass.kernels.rank.window_rows import INF, logits_of, probabilities_of
from kvpass.kernels.rule import Record, Rule
from torch import Tensor

UNHEARD = -1.0
"""The score of a key that a call does not repeat: below every probability."""

TILE = 1 << 22
"""Probabilities that are held at once, at most: 16 MiB of float32."""


@dataclass(frozen=True)
class Replay(Record):
    """Whether slots wait for scores that the prompt gives them when it is read again.

    Attributes:
        replay: tokens that one call repeats; 0: nothing is replayed.
        normed: probabilities are multiplied by ||v W_O||_2 of their query head, and divided by ||x||_2 of the query's
            hidden states (KVzip+).
        summed: the score is the geometric mean of the largest probability and of the most that a query head gives a key
            in all.
    """

    replay: int = 0
    normed: bool = False
    summed: bool = False

    def work(self, rule: Rule) -> Iterator[str]:
        """The whole model again, and the scores' own softmax."""
        if self.replay:
            yield f"2nd prefill + {self.replay}*T"


def replay_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    mask: Tensor | None,
    valid: Tensor,
    stats: Tensor,
    cursor: Tensor,
    repeated: Tensor,
    scale: float,
    sees: str,
    rule: str,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    tokens: Tensor | None = None,
    position: int = 0,
    memory_k: Tensor | None = None,
    memory_v: Tensor | None = None,
    bias: Tensor | None = None,
    wo: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """The largest probability that any query of a call, in any head of the group, gives each key that it repeats.
    Under a rule that is `summed`: sqrt(that * the largest sum over the call's queries of any head of the group).

    Of a softmax over the first `Protected.sinks` tokens of the row, the repeated ones, and the call's own up to the
    query; other keys are taken to be away. Arguments as for prefill_attend; valid bool [B, S], from there; stats
    float32 [N, B, Hkv, L] and cursor int32 [B, Hkv, 6]: what the keys keep, and the cursor before the call.
    repeated: int32 [B, 2], from which to below which place of its row a call repeats; equal: it repeats nothing. wo
    [out, Hq * Dv] and hidden [B, S, size]: for rules that are `normed`.

    Returns float32 [B, Hkv, L], `UNHEARD` for keys that are not repeated.
    """
    plan, out = Rule.parse(rule), torch.full(pos.shape, UNHEARD, device=pos.device)
    low, high = repeated[:, :1, None], repeated[:, 1:, None]
    if not bool((low < high).any()):
        return out
    where = key_places(pos, valid, cursor, stats, (*pos.shape,), plan)
    chunk = (where >= low) & (where < high)
    own = torch.arange(k.shape[2], device=k.device) >= k.shape[2] - q.shape[2]
    read = chunk | ((where >= 0) & ((where < plan[Protected].sinks) | own))
    index = (~read).int().argsort(dim=-1, stable=True)[..., : int(read.sum(-1).max())]
    keys = _Keys(_taken(k, index), pos.gather(-1, index), read.gather(-1, index))
    bias = None if bias is None else bias.gather(-1, index)
    norms = _norms(_taken(v, index), wo) if plan[Replay].normed and wo is not None else None
    inputs = None if hidden is None or norms is None else torch.linalg.vector_norm(hidden.float(), dim=-1)
    best, step = torch.zeros(index.shape, device=k.device), max(1, TILE // max(1, len(q) * q.shape[1] * index.shape[2]))
    total = torch.zeros(*index.shape[:2], q.shape[1] // k.shape[1], index.shape[2], device=k.device)
    for start in range(0, q.shape[2], step):
        rows = slice(start, min(start + step, q.shape[2]))
        shown = Shown(Sees.parse(sees), q.shape[2], position, tokens, None, mask, bias)
        softmax = softmax_of("replay_scores", q[:, :, rows], scale, sinks, softcap, memory_k, memory_v)
        place = torch.arange(rows.start, rows.stop, device=q.device).expand(len(q), -1)
        logits = logits_of(q[:, :, rows], place, keys.k, keys.pos, shown, softmax)
        there = keys.read[:, :, None, None] & valid[:, None, None, rows, None]
        probs = probabilities_of(logits.masked_fill(~there, -INF), softmax)
        if norms is not None and inputs is not None:
            probs = probs * norms[:, :, :, None] / inputs[:, None, None, rows, None].clamp(min=1e-30)
        best = torch.maximum(best, probs.amax((2, 3)))
        total += probs.sum(3)
    best = (best * total.amax(2)).sqrt() if plan[Replay].summed else best
    heard = keys.read & chunk.gather(-1, index)
    return out.scatter_(-1, index, torch.where(heard, best, UNHEARD))


class _Keys(NamedTuple):
    """The keys of the softmax, in order; those that a head has fewer of are not to be `read`."""

    k: Tensor
    """[B, Hkv, R, D]"""
    pos: Tensor
    """int32 [B, Hkv, R]"""
    read: Tensor
    """bool [B, Hkv, R]"""


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """Keys or values [B, Hkv, L, D] at `index` [B, Hkv, R]."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))


def _norms(v: Tensor, wo: Tensor) -> Tensor:
    """||v W_O||_2 of each query head: float32 [B, Hkv, G, R]. By W_O's Gram matrices, [Dv, Dv]: [R, out] is never made.

    v [B, Hkv, R, Dv], wo [out, Hq * Dv].
    """
    parts = wo.float().unflatten(1, (v.shape[1], -1, v.shape[3]))  # [out, Hkv, G, Dv]
    gram = torch.einsum("ohgd,ohge->hgde", parts, parts)
    values = v.float()
    squares = torch.einsum("bhrd,hgde,bhre->bhgr", values, gram, values)
    return squares.clamp(min=0).sqrt()
