"""Expected Attention: what queries that are still to come will look at."""

from __future__ import annotations

import torch
from kvpass.kernels.rank.scorers.registry import scorer
from kvpass.kernels.rank.scorers.seen import Seen
from torch import Tensor


@scorer("expected_attention", reads=("keys", "queries"), heads="each")
def expected_attention(seen: Seen, future: int = 512, skip: int = 4) -> Tensor:
    """Attention that Gaussian queries would give, for the mean and covariance of this call's unrotated queries, rotated
    on average over the next `future` positions (arXiv 2510.00636, before the value weight).

    softmax_j(k_j mu / sqrt(d) + k_j^T S k_j / (2 d)), group mean; the first `skip` tokens neither count nor score.
    """
    own = seen.candidate[:, 0, seen.pos.shape[-1] - seen.queries.shape[3] :]
    later = own & (own.cumsum(-1) + seen.seen[:, 0] - own.sum(-1, keepdim=True) > skip)
    weight = (later / later.sum(-1, keepdim=True).clamp(min=1)).double()[:, None, None, :, None]
    queries = seen.queries.double()
    mean = (queries * weight).sum(3)
    centred = (queries - mean[..., None, :]) * weight.sqrt()
    spread = centred.mT @ centred
    turn = _average_turn(seen, own, future)[:, None, None]
    mean, spread = (turn @ mean[..., None])[..., 0], turn @ spread @ turn.mT
    keys, size = seen.keys.double()[:, :, None], seen.keys.shape[-1]
    logits = (keys @ mean[..., None])[..., 0] / size**0.5 + ((keys @ spread) * keys).sum(-1) / (2 * size)
    scored = seen.candidate & (seen.pos >= seen.first + skip)
    probs = logits.masked_fill(~scored[:, :, None], -torch.inf).softmax(-1)
    mean_over_group: Tensor = probs.nan_to_num(0.0).mean(2).float()
    return mean_over_group


def _average_turn(seen: Seen, own: Tensor, future: int) -> Tensor:
    """Mean rotation matrix over the next positions, float64 [B, D, D]: the last query's, and then step by step what
    lies between the last two.
    """
    where = torch.arange(own.shape[1], device=own.device)
    last = torch.where(own, where, 0).amax(-1)
    half = seen.angles.shape[-1] // 2
    cos, sin = (x.expand(len(own), -1, -1)[..., :half].double() for x in seen.angles)
    turn = torch.complex(cos, sin)
    at, before = (turn[torch.arange(len(own)), (last - back).clamp(min=0)] for back in (0, 1))
    step = at / before
    step = step / step.abs()
    ahead = torch.arange(1, future + 1, device=own.device)
    mean = at * torch.polar(torch.ones_like(cos[:, :1, :1]), step.angle()[:, None] * ahead[:, None]).mean(1)
    real, imaginary = torch.diag_embed(mean.real), torch.diag_embed(mean.imag)
    return torch.cat([torch.cat([real, -imaginary], -1), torch.cat([imaginary, real], -1)], -2)
