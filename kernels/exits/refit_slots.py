"""refit_slots: slots that stay are fitted to stand for what a call of several tokens evicts, as
`kvpass.kernels.exits.refit` does it. Pure torch on every device.

After `compact_slots`, head by head, so that one head's rows of attention are held at once. Protected slots keep their
values and have no say: the span between them is fitted by itself, its mass and its output, and then goes with any other
slots in one softmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.attention.visibility import Sees, Shown
from kvpass.kernels.exits.refit import Refit, refitted
from kvpass.kernels.rank.window_rows import last_valid, logits_of, picked
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.bias import BIAS
from kvpass.kernels.slots.cursor import LIVE
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
    held, refit = State.of(state, plan), plan[Refit]
    index, there = last_valid(valid, refit.refit_queries)
    shown = Shown(Sees.parse(sees), q.shape[2], position, tokens, None, mask, bias)
    queries, group = picked(q, index), q.shape[1] // k.shape[1]
    first, live = starts(held.cursor, held.slots).tolist(), held.cursor[..., LIVE].tolist()
    for b in range(len(k)):
        row = shown.of_rows(slice(b, b + 1))
        for h in range(k.shape[1]):
            span = (score[b, h] > -torch.inf) & (score[b, h] < torch.inf)
            kept = idx[b, h, : live[b][h]].long()
            slots = span[kept].nonzero().flatten()
            if not len(slots) or len(slots) == int(span.sum()):
                continue
            one, own = (slice(b, b + 1), slice(h, h + 1)), slice(h * group, (h + 1) * group)
            rows = logits_of(
                queries[one[0], own],
                index[one[0]],
                k[one],
                None if pos is None else pos[one],
                _of_head(row, h, group),
                Softmax(scale, None, softcap),
            )[0, 0][:, there[b]]
            among = span.nonzero().flatten()
            chosen = torch.searchsorted(among, kept[slots])
            places = first[b][h] + slots
            biases, values = held[BIAS].view(-1), held.v.view(-1, held.v.shape[3])
            found = refitted(rows[..., among].flatten(0, 1), v[b, h, among], chosen, biases[places], refit)
            if found is not None:
                biases[places] = found[0]
                values[places] = found[1].to(values.dtype)


def _of_head(shown: Shown, head: int, group: int) -> Shown:
    """What one KV head's queries see."""
    mask, bias = shown.mask, shown.bias
    if mask is not None and mask.shape[1] > 1:
        mask = mask[:, head * group : (head + 1) * group]
    return shown._replace(mask=mask, bias=None if bias is None else bias[:, head : head + 1])
