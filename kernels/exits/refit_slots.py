"""refit_slots: slots that stay are fitted to stand for what a call of several tokens evicts, as
`kvpass.kernels.exits.refit` does it. Pure torch on every device.

After `compact_slots`, head by head, so that one head's rows of attention are held at once. Protected slots keep their
values and have no say: the span between them is fitted by itself, its mass and its output, and then goes with any other
slots in one softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.attention.visibility import Sees, Shown
from kvpass.kernels.exits.refit import Refit, refitted
from kvpass.kernels.rank.lone import lone
from kvpass.kernels.rank.window_rows import last_valid, logits_of, picked
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.bias import BIAS
from kvpass.kernels.slots.cursor import LIVE, SEEN
from kvpass.kernels.slots.ragged import starts
from kvpass.kernels.slots.state import State
from torch import Tensor


def refit_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    mask: Tensor | None,
    valid: Tensor,
    scale: float,
    sees: str,
    score: Tensor,
    idx: Tensor,
    state: Sequence[Tensor],
    rule: str,
    softcap: float = 0.0,
    tokens: Tensor | None = None,
    position: int = 0,
    bias: Tensor | None = None,
) -> None:
    """Fit values and biases of the slots that stay, in place, after `compact_slots`.

    q [B, Hq, S, D], k [B, Hkv, L, D], v [B, Hkv, L, Dv] and what is said of them as for `prefill_attend`, biases that
    slots had too; valid: bool [B, S], from there; score: float32 [B, Hkv, L], of `score_slots`: keys of score +inf are
    protected, and those of -inf nobody's; idx: int32 [B, Hkv, n], of `select_slots`. state: the tensors of `State`
    under the rule.
    """
    plan = Rule.parse(rule)
    held = State.of(state, plan)
    index, there = last_valid(valid, plan[Refit].refit_queries)
    shown = Shown(Sees.parse(sees), q.shape[2], position, tokens, None, mask, bias)
    queries, softmax = picked(q, index), Softmax(scale, None, softcap)
    before = held.cursor.clone()
    before[..., SEEN] -= valid.sum(-1, keepdim=True)
    stepped = lone(valid, before, plan)[:, 0]
    for b in (~stepped).nonzero().flatten().tolist():
        watched = Watched(queries[b : b + 1], index[b : b + 1], there[b], shown.of_rows(slice(b, b + 1)), softmax)
        for h in range(k.shape[1]):
            _refit(watched, (k[b : b + 1], v[b, h], pos), score[b, h], idx[b, h], held, (b, h), plan[Refit])


class Watched(NamedTuple):
    """The reference queries of one sequence."""

    q: Tensor
    """[1, Hq, w, D]"""
    places: Tensor
    """int64 [1, w], their places in the call."""
    there: Tensor
    """bool [w], which of them exist."""
    shown: Shown
    softmax: Softmax

    def logits(self, head: int, k: Tensor, pos: Tensor | None) -> Tensor:
        """With the keys of one KV head, of k [1, Hkv, L, D] at pos [1, Hkv, L]: float32 [n, L], -inf where hidden."""
        group, one = self.q.shape[1] // k.shape[1], slice(head, head + 1)
        own = slice(head * group, (head + 1) * group)
        mask, bias = self.shown.mask, self.shown.bias
        mask = mask if mask is None or mask.shape[1] == 1 else mask[:, own]
        shown = self.shown._replace(mask=mask, bias=None if bias is None else bias[:, one])
        pos = pos if pos is None else pos[:, one]
        rows = logits_of(self.q[:, own], self.places, k[:, one], pos, shown, self.softmax)
        return rows[0, 0][:, self.there].flatten(0, 1)


def _refit(
    watched: Watched,
    keys: tuple[Tensor, Tensor, Tensor | None],
    score: Tensor,
    idx: Tensor,
    state: State,
    at: tuple[int, int],
    refit: Refit,
) -> None:
    """One head. keys: k [1, Hkv, L, D] of its row, v [L, Dv] of the head, and pos [B, Hkv, L]."""
    (b, h), (k, v, pos) = at, keys
    span = (score > -torch.inf) & (score < torch.inf)
    kept = idx[: int(state.cursor[b, h, LIVE])].long()
    slots = span[kept].nonzero().flatten()
    if not len(slots) or len(slots) == int(span.sum()):
        return
    among = span.nonzero().flatten()
    logits = watched.logits(h, k, None if pos is None else pos[b : b + 1])[:, among]
    places = starts(state.cursor, state.slots)[b, h] + slots
    biases, values = state[BIAS].view(-1), state.v.view(-1, state.v.shape[3])
    found = refitted(logits, v[among], torch.searchsorted(among, kept[slots]), biases[places], refit)
    if found is not None:
        biases[places] = found[0]
        values[places] = found[1].to(values.dtype)
