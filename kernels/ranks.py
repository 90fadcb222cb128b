"""Heads of a layer that lie on several ranks (tensor parallel): what a rank learns of the heads of others.

The one place where ranks talk. A rule has the record only if something in it looks over all heads of a layer, or counts
them (`Record.joins`): a head's own business needs nobody. All ranks make the same calls in the same order, because what
decides about a call is the same on all of them: the rule, the masks, numbers of tokens, and what was gathered before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import torch
from kvpass.kernels.errors import RanksError
from kvpass.kernels.rule import Record, Rule
from torch import Tensor


@dataclass(frozen=True)
class Ranks(Record):
    """The heads of a layer are parted among `ranks` ranks, equally many each, in the order of the ranks.

    Attributes:
        ranks: how many; 1: all heads are here.
        rank: which of them this is, from 0.
        ranks_group: the name of their process group, quoted.
    """

    ranks: int = 1
    rank: int = 0
    ranks_group: str = ""


def elsewhere(rule: Rule) -> bool:
    """Whether other ranks have heads of the layer that this rule must know of."""
    return rule[Ranks].ranks > 1


def alone(rule: Rule) -> Rule:
    """The rule of a rank that asks nobody."""
    return Rule(*(record for record in rule if not isinstance(record, Ranks))) if elsewhere(rule) else rule


def first_head(rule: Rule, heads: int) -> int:
    """The number of this rank's first head among those of all ranks, each of which has `heads`."""
    return rule[Ranks].rank * heads


def gathered(x: Tensor, rule: Rule, dim: int = 1) -> Tensor:
    """x of the heads of all ranks, `ranks` times as many along `dim`; x itself where all heads are here. Any dtype; the
    same shape on all ranks.

    Raises:
        RanksError: this process has no such group.
    """
    if not elsewhere(rule) or not x.numel():
        return x
    import torch.distributed as dist

    own, group = x.contiguous(), _group(rule)
    parts = [torch.empty_like(own) for _ in range(rule[Ranks].ranks)]
    dist.all_gather([_bytes(part) for part in parts], _bytes(own), group=group)
    return torch.cat(parts, dim)


def own_part(x: Tensor, rule: Rule, dim: int = 1) -> Tensor:
    """This rank's heads of what is of all ranks' (a view), or x itself where all heads are here."""
    if not elsewhere(rule):
        return x
    heads = x.shape[dim] // rule[Ranks].ranks
    return x.narrow(dim, first_head(rule, heads), heads)


def widest(x: Tensor, rule: Rule) -> int:
    """The longest last dim of all ranks' x: where heads hold different numbers of slots, ranks do too."""
    if not elsewhere(rule):
        return x.shape[-1]
    return int(gathered(torch.tensor([x.shape[-1]], device=x.device), rule, 0).max())


def _bytes(x: Tensor) -> Tensor:
    """Not every backend moves every dtype."""
    return x.view(-1).view(torch.uint8)


def _group(rule: Rule) -> Any:
    """The process group of the rule.

    Raises:
        RanksError: there is none of that name in this process, or its ranks are others.
    """
    import torch.distributed as dist

    said, name = rule[Ranks], unquote(rule[Ranks].ranks_group)
    groups: Any = dist.distributed_c10d
    try:
        group = groups._resolve_process_group(name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise _unknown(said, name) from error
    if (dist.get_world_size(group), dist.get_rank(group)) != (said.ranks, said.rank):
        raise _unknown(said, name)
    return group


def _unknown(said: Ranks, name: str) -> RanksError:
    return RanksError(
        f"this process is not rank {said.rank} of {said.ranks} of a process group {name!r}, which has the other heads",
        "load the model by torchrun with as many processes as before, and compile it there; a cache goes on in the run "
        "that made it",
    )
