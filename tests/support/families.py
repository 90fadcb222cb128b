"""Every causal-LM family of the installed transformers as a tiny random model."""

from __future__ import annotations

from typing import Any

import torch
from overrides import OVERRIDES
from shrink import tiny_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

FAMILIES: list[str] = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

GAIN = 1.2


def build(family: str, attention: str, other: bool = False) -> Any:
    """A tiny model of this family, the same weights each time, in eval mode; `other`: in its second shape.

    Raises:
        ValueError: it has no second shape.
    """
    config = tiny_config(CONFIG_MAPPING[family], OVERRIDES.get(family), other)
    if config is None:
        raise ValueError("it has one shape only")
    part = OVERRIDES.get(family, {}).get("__part__")
    if getattr(config, "is_decoder", True) is False:
        config.is_decoder = True
    torch.manual_seed(1)
    if part:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model = model_class._from_config(getattr(config, part), attn_implementation=attention)
    else:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    sharpen(model)
    return model.eval()


def sharpen(model: Any) -> None:
    """Weights so large that attention is far from uniform and scores far from tied."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.weight.data.normal_(0, 1)
        elif isinstance(module, (torch.nn.Linear, Conv1D)):
            fan_in = module.weight.shape[isinstance(module, torch.nn.Linear)]
            module.weight.data.normal_(0, GAIN * fan_in**-0.5)
        else:
            for weight in module.parameters(recurse=False):
                if weight.dim() == 3:  # experts
                    weight.data.normal_(0, GAIN * min(weight.shape[1:]) ** -0.5)
