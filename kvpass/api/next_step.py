"""The call after a prompt: what `explain` gives a model so that it takes one step from the cache that it returned."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

Inputs = Mapping[str, Any] | tuple[Any, ...]
StepLike = Inputs | Callable[[Any], Any] | None

GIVE_A_STEP = "say how one is called: explain(.., step=lambda out: {..keyword arguments})"
CACHE_FIELDS = ("cache", "past_key_values")
TOKENS = ("decoder_input_ids", "input_ids", "decoder_inputs_embeds", "inputs_embeds")
"""What a step gives one more of, the first of them that the call was given."""


class NoStep(Exception):
    """The step is not known, with the reason."""


def next_call(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, step: StepLike
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the call after one with `args` and `kwargs` that gave `output`.

    Raises:
        NoStep: the output has no cache that is known by its name, or the tokens are not.
    """
    if step is not None:
        return _given(step(output) if callable(step) else step)
    fields = output if isinstance(output, Mapping) else {}
    name = next((name for name in CACHE_FIELDS if fields.get(name) is not None), None)
    if name is None:
        return (), _of_tuple(model, args, kwargs, output)
    inputs = _by_name(model, args, kwargs)
    tokens = next((name for name in TOKENS if isinstance(inputs.get(name), torch.Tensor)), None)
    if tokens is None:
        raise NoStep(f"as the call was given none of {', '.join(TOKENS)}; {GIVE_A_STEP}")
    return (), {**_carried(inputs, tokens), tokens: inputs[tokens][:, -1:], name: fields[name], **_encoded(fields)}


def _by_name(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs)
    inputs = dict(given.arguments)
    for parameter in given.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            inputs |= inputs.pop(parameter.name, {})
    return inputs


def _of_tuple(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> dict[str, Any]:
    """For `forward(tokens, cache=None) -> (logits, cache)`, however the two are called.

    Raises:
        NoStep: it is not clear which argument takes the cache, or what is one.
    """
    parts = output if isinstance(output, tuple) else ()
    caches = [part for part in parts if isinstance(part, (list, tuple, dict)) and part]
    inputs = _by_name(model, args, kwargs)
    parameters = inspect.signature(model.forward).parameters.values()
    open_ones = [p.name for p in parameters if p.default is None and inputs.get(p.name) is None]
    tokens = [name for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.dim() > 1]
    if len(caches) != 1 or len(open_ones) != 1 or len(tokens) != 1:
        raise NoStep(f"as the model returned no {' or '.join(CACHE_FIELDS)}; {GIVE_A_STEP}")
    return {**inputs, tokens[0]: inputs[tokens[0]][:, -1:], open_ones[0]: caches[0]}


def _given(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _carried(inputs: dict[str, Any], tokens: str) -> dict[str, Any]:
    """What a step is given again: options, and the mask and positions of one more token. Not images, nor labels."""
    kept = {name: value for name, value in inputs.items() if not _holds_tensors(value) and name not in CACHE_FIELDS}
    masks = ["decoder_attention_mask"] if tokens.startswith("decoder_") else ["attention_mask"]
    for name in masks:
        mask = inputs.get(name)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            kept[name] = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    if tokens.startswith("decoder_") and "attention_mask" in inputs:
        kept["attention_mask"] = inputs["attention_mask"]
    positions = inputs.get("position_ids")
    if isinstance(positions, torch.Tensor):
        kept["position_ids"] = positions[..., -1:] + 1
    return kept


def _holds_tensors(value: Any) -> bool:
    """Tensors, objects such as caches, and containers of them belong to the call that they were given to."""
    return value is not None and not isinstance(value, (bool, int, float, str))


def _encoded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the encoder made, so that a step does not run it again."""
    state = fields.get("encoder_last_hidden_state")
    return {} if state is None else {"encoder_outputs": (state,)}
