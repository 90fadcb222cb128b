"""How far a policy's predictions are from the full cache's: a divergence over the likeliest tokens and all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LIKELIEST = 512
"""Tokens that are told apart, the full cache's likeliest; all others count as one. The divergence is then a lower
bound of the one over all tokens, and a reference takes kilobytes instead of megabytes."""


@dataclass(frozen=True)
class Outlook:
    """What the full cache expects after each of S tokens.

    Attributes:
        tokens: int64 [S, K], the likeliest, best first.
        logp: float32 [S, K + 1], their log-probabilities, and that of all others together.
    """

    tokens: torch.Tensor
    logp: torch.Tensor


def outlook(logits: torch.Tensor) -> Outlook:
    """Of logits [S, V]."""
    logp = logits.float().log_softmax(-1)
    tokens = logp.topk(min(LIKELIEST, logp.shape[-1] - 1), -1).indices
    return Outlook(tokens, _told_apart(logp, tokens))


def _told_apart(logp: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    named = logp.gather(-1, tokens)
    rest = logp.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([named, rest], -1)


def divergence(full: Outlook, logits: torch.Tensor) -> torch.Tensor:
    """KL(full cache || policy) in nats after each token, float32 [S], from the policy's logits [S, V]."""
    kept = _told_apart(logits.float().log_softmax(-1), full.tokens)
    share = full.logp.exp()
    return torch.where(share > 0, share * (full.logp - kept), 0.0).sum(-1).clamp(min=0.0)
