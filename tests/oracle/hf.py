"""The simulator inside an unmodified transformers model: attn_implementation="oracle" and a DynamicCache that
keeps every token."""

from __future__ import annotations

import copy
from typing import Any

import torch
from oracle.base import Policy
from oracle.simulator import Simulator
from spelling import with_cache
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ACTIVE: list[Simulator] = []
"""The simulator of the forward pass that is running. transformers gives an attention function no other way to find
it."""


def attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Any, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = ACTIVE[-1].attend(module.layer_idx, query, key, value, mask, scale)
    return out.transpose(1, 2).contiguous(), None


def explicit_mask(*args: Any, **kwargs: Any) -> torch.Tensor:
    """The boolean mask that the model means, also where sdpa would leave it out."""
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    assert mask is not None
    return mask


AttentionInterface.register("oracle", attention)
AttentionMaskInterface.register("oracle", explicit_mask)


def twin(model: Any) -> Any:
    """The same model on the same parameters with a config of its own, running the oracle's attention."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    other = copy.deepcopy(model, shared)
    other.set_attn_implementation("oracle")
    return other


def attention_modules(model: Any) -> list[tuple[int, Any]]:
    found = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "o_proj")]
    return [(m.layer_idx, m) for m in found]


def outward(module: Any) -> torch.Tensor:
    """[Hq,Dv,hidden]: what the output of each query head is multiplied with."""
    weight = module.o_proj.weight.detach().double()
    return weight.T.unflatten(0, (-1, module.head_dim))


class Oracle:
    """A conversation with the naive model: call it with tokens, it returns logits and has evicted."""

    def __init__(self, model: Any, policy: str | Policy, budget: float | int = 1.0, floor: int = 64) -> None:
        self.model = twin(model)
        self.simulator = Simulator(policy, budget, floor)
        self.simulator.depth = model.config.get_text_config().num_hidden_layers
        self.simulator.outward = {i: outward(m) for i, m in attention_modules(model)}
        rotary = next((m for m in model.modules() if hasattr(m, "inv_freq")), None)
        self.simulator.angles = None if rotary is None else rotary.inv_freq.double()
        self.cache = DynamicCache(config=self.model.config)

    def __call__(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """[B, vocabulary] logits of the last token."""
        ACTIVE.append(self.simulator)
        try:
            with torch.no_grad():
                out = self.model(input_ids, **with_cache(self.model, self.cache), logits_to_keep=1, **kwargs)
        finally:
            ACTIVE.pop()
        return out.logits[:, -1]

    def generate(self, input_ids: torch.Tensor, steps: int, **kwargs: Any) -> torch.Tensor:
        """Greedy tokens [B, steps]; `steps` calls, so the last token is chosen but not fed."""
        chosen = []
        logits = self(input_ids, **kwargs)
        for step in range(steps):
            chosen.append(logits.argmax(-1, keepdim=True))
            if step + 1 < steps:
                logits = self(chosen[-1])
        return torch.cat(chosen, dim=1)
