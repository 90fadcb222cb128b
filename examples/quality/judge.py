"""Whether an answer is right, by forced decoding: no other model judges, and no text is compared."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from quality.reference import call, follow
from quality.tasks.trial import Question


def judged(model: Any, cache: Any, second: torch.Tensor, asked: Sequence[Question]) -> list[dict[str, Any]]:
    """Is each gold token the most likely one, given those before it? Then greedy decoding says the whole answer. Where
    there are rivals: is the gold answer likelier than each of them, a token?
    """
    first = call(model, second, cache)[:, None]
    rivals = [_ids(rows) for rows in zip(*(one.rivals for one in asked), strict=True)]
    others = [_nll(_along(model, copy.deepcopy(cache) if len(r[0]) > 1 else None, first, r), r) for r in rivals]
    gold = _ids([one.gold for one in asked])
    logp = _along(model, cache, first, gold)
    right, nll = logp.argmax(-1) == gold, _nll(logp, gold)
    best = torch.stack([nll < other for other in others]).all(0) if others else right.all(-1)
    return [
        {"right": bool(won), "digits": int(row.sum()), "nll": float(value)}
        for won, row, value in zip(best, right, nll, strict=True)
    ]


def _along(model: Any, cache: Any, first: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of each next token, `[B, S, V]`, along S tokens; `first` are those of the first."""
    if tokens.shape[1] == 1:
        return first
    return torch.cat([first, follow(model, cache, tokens[:, :-1])], dim=1)


def _nll(logp: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean over an answer's tokens, `[B]`."""
    return -logp.gather(-1, tokens[..., None])[..., 0].mean(-1)


def _ids(rows: Sequence[list[int]]) -> torch.Tensor:
    return torch.tensor(list(rows))


def spans_of(fed: list[list[int]], asked: Sequence[Question]) -> list[tuple[int, int] | None]:
    """Where in each row's tokens the answer stands; None where it does not, or several times."""
    return [_span(row, one.gold) for row, one in zip(fed, asked, strict=True)]


def _span(row: list[int], gold: list[int]) -> tuple[int, int] | None:
    starts = [at for at, token in enumerate(row) if token == gold[0] and row[at : at + len(gold)] == gold]
    return (starts[0], starts[0] + len(gold)) if len(starts) == 1 else None


def only(left: Sequence[dict[str, Any] | None] | None, row: int) -> dict[str, Any]:
    """Of what is left of a row's answer: the share that is kept, and how many of its tokens no head holds."""
    found = left[row] if left is not None else None
    return {key: found[key] for key in ("kept", "gone")} if found else {}
