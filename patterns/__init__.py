"""The pattern room: declarative recognisers of attention cores and cache updates. Knows no policy and no kernel.

A core pattern has `name` and `match(node) -> Core | None`, an update pattern `name` and `match(node, flow) -> Update
| None`.
None means "not mine"; a `Miss` means "mine, but not supported", with the reason. Installed as `kvpass.patterns`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvpass.patterns.cache_buffer import BufferUpdate
from kvpass.patterns.cache_concat import ConcatUpdate
from kvpass.patterns.cache_returned import ReturnedUpdate
from kvpass.patterns.declined import BufferWrite, PartlyStored
from kvpass.patterns.latent import LatentAttention
from kvpass.patterns.sdpa import SdpaCore
from kvpass.patterns.sdpa_aten import AtenSdpaCore
from kvpass.patterns.sliding_window import SlidingWindow
from kvpass.patterns.softmax import SoftmaxCore


@dataclass(frozen=True)
class PatternSet:
    """Cores and updates are tried on every node; `refused`, then `returned`, only on values that a core reads."""

    cores: tuple[Any, ...]
    updates: tuple[Any, ...]
    returned: Any
    refused: tuple[Any, ...] = ()
    expanded: tuple[Any, ...] = ()


DEFAULT = PatternSet(
    cores=(SdpaCore(), AtenSdpaCore(), SoftmaxCore()),
    updates=(ConcatUpdate(), BufferUpdate()),
    returned=ReturnedUpdate(),
    refused=(SlidingWindow(), BufferWrite(), PartlyStored()),
    expanded=(LatentAttention(),),
)
