"""A scorer tried on made-up keys, for `kvpass policies check`: what it gives is known before any model runs."""

from __future__ import annotations

import torch
from kvpass.kernels.errors import DataError, ScorerError
from kvpass.kernels.rank.scorers.registry import Scorer, encode_options
from kvpass.kernels.rank.scorers.seen import Seen

_DIMS = (64, 128, 16)
"""Head dims that are tried: a scorer with weights of its own fits one of them at most."""


def tried(scorer: Scorer, options: dict[str, bool | int | float | str]) -> str:
    """Score made-up keys once: "", or why nothing can be said.

    Raises:
        ScorerError: the scorer fails in a way that no model's sizes explain, or gives what are no scores.
    """
    unfit = ""
    for dim in _DIMS:
        try:
            scorer.score(_made_up(scorer, dim), encode_options(options))
        except ScorerError as error:
            cause = error.__cause__
            if not isinstance(cause, (RuntimeError, IndexError)):
                raise
            unfit = f"not tried: it raised {type(cause).__name__} on made-up keys, {cause}".splitlines()[0]
        except DataError as error:
            return f"not tried: {error}"
        else:
            return ""
    return unfit


def _made_up(scorer: Scorer, dim: int, batch: int = 2, heads: int = 2, group: int = 2, length: int = 40) -> Seen:
    """What a call of `length` tokens shows of one layer; the second row begins with padding."""
    made = torch.Generator().manual_seed(0)
    padding = torch.tensor([0, 5])[:batch, None, None]
    pos = torch.arange(length, dtype=torch.int32).expand(batch, heads, length)
    window = 8 if {"rows", "logits"} & set(scorer.reads) else 0
    rows = torch.rand(batch, heads, group, max(window, 1), length, generator=made)
    keys = torch.randn(2, batch, heads, length, dim, generator=made)
    flat = torch.ones(batch, heads, 1)
    return Seen(
        pos=pos,
        candidate=pos >= padding,
        end=(flat * length).int(),
        first=(flat * padding).int(),
        seen=(flat * (length - padding)).long(),
        budget=(flat * 16).long(),
        window=window,
        seed=0,
        k=keys[0] if "keys" in scorer.reads else None,
        v=keys[1] if "values" in scorer.reads else None,
        rows=rows.log() if "logits" in scorer.reads else rows if window else None,
        statistics=dict.fromkeys(("sum", "sumsq", "count", "important", "last"), rows[:, :, 0, 0])
        if "statistics" in scorer.reads
        else {},
        h=torch.randn(batch, length, 2 * heads * dim, generator=made) if "hidden" in scorer.reads else None,
        q=torch.randn(batch, heads * group, length, dim, generator=made) if "queries" in scorer.reads else None,
        turns=torch.ones(2, 1, length, dim) if "queries" in scorer.reads else None,
        at=0 if "layer" in scorer.reads else None,
        stay=pos == 7 if "marks" in scorer.reads else None,
    )
