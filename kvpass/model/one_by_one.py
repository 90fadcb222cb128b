"""A call of several tentative tokens as calls of one token each, in the words of transformers' models.

Plain decoding evicts after each token, so a call of S tokens must have the effect of S steps, and the surest way is to
take them. What a call begins with and is settled (a prompt) is one call, as it is without drafts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from kvpass.errors import CacheError
from kvpass.model.asked import CACHES, cache_in, length_of
from kvpass.runtime.drafts import Block, entered, of_one_token

_TOKENS = ("input_ids", "inputs_embeds")
_ALONG = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1, "cache_position": 0, "token_type_ids": 1,
          "mm_token_type_ids": 1}  # fmt: skip
"""Arguments with an entry for each token, and the axis of those."""
_JOINED = ("logits", "last_hidden_state")
_ENCODED = ("encoder_outputs", "encoder_hidden_states", "encoder_attention_mask", "mm_encoder_outputs")
"""What all tokens of a call attend to besides."""
_ASKED = ("output_attentions",)


class Several(NamedTuple):
    """A call of several tokens."""

    given: dict[str, Any]
    """Its arguments by name."""
    tokens: int
    past: int
    """Tokens in the cache before them."""
    room: int
    """Tokens that a preallocated cache is for, each of which has a column in a 4-dimensional mask; 0: it grows."""


def one_by_one(block: Block, module: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A call under a block of tentative tokens.

    Args:
        module: whose forward is called, for the names of its arguments.
        run: makes the call.

    Returns what the call would return, with the cache that its last token left.

    Raises:
        CacheError: an argument or an output of a call of several tokens cannot be parted.
    """
    if block.owner is not None:  # as `generate` gives it without drafts: the same graphs
        kwargs = {**kwargs, "return_dict": True}
    asked = _asked(module, args, kwargs)
    if asked is None:
        with entered(of_one_token(block, 1)):
            return run(*args, **kwargs)
    settled = min(max(block.settled - asked.past, 0), asked.tokens)
    if not asked.past and not block.settled:  # what begins a cache is a prompt
        settled = asked.tokens
    if settled == asked.tokens:
        with entered(None):
            return run(*args, **kwargs)
    single = of_one_token(block, asked.tokens - settled)
    if asked.tokens == 1:
        with entered(single):
            return run(*args, **kwargs)
    _check(asked, settled, module)
    return _in_parts(asked, settled, single, run)


def _asked(module: Any, args: Any, kwargs: Any) -> Several | None:
    """What a call is given; None where it does not say its tokens by a known name."""
    names = list(inspect.signature(module.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    tokens = next((given[name] for name in _TOKENS if isinstance(given.get(name), torch.Tensor)), None)
    if tokens is None or tokens.dim() < 2 or not set(CACHES) & {*names, *given}:
        return None
    if "decoder_input_ids" in names:  # there `input_ids` are the encoder's
        return None
    cache = cache_in(given)
    room = max(0, int(cache.get_max_length())) if getattr(cache, "is_compileable", False) else 0
    return Several(given, tokens.shape[1], length_of(cache), room)


def _check(asked: Several, settled: int, module: Any) -> None:
    """Before any work: is there anything in the call that its tokens cannot be given apart?"""
    config = getattr(module, "config", None)
    for name in _ASKED:
        value = asked.given.get(name)
        if getattr(config, name, False) if value is None else value:
            raise _unparted(name, "attention is not kept for it; leave it out, or give the tokens one by one")
    if asked.given.get("return_dict") is False or getattr(config, "return_dict", True) is False:
        raise _unparted("return_dict=False", "leave it out")
    if asked.given.get("use_cache") is False:
        raise _unparted("use_cache=False", "tentative tokens are those of a cache: leave it out")
    for name, value in asked.given.items():
        known = name in (*_ALONG, *CACHES, *_ENCODED, "attention_mask")
        if isinstance(value, torch.Tensor) and not known and not settled:
            raise _unparted(name, "give the tokens one by one")
    if 0 < asked.room < asked.past + asked.tokens:
        what = f"{asked.past} tokens and {asked.tokens} tentative ones do not fit into a cache for {asked.room}"
        raise CacheError(what, where="kvpass.tentative", hint="draft less, or let the cache grow (a DynamicCache)")
    keep = asked.given.get("logits_to_keep", 0)
    if isinstance(keep, torch.Tensor):
        raise _unparted("logits_to_keep as a tensor", "give a number")


def _in_parts(asked: Several, settled: int, single: Block, run: Callable[..., Any]) -> Any:
    ends = [*([settled] if settled else []), *range(settled + 1, asked.tokens + 1)]
    given, outs, begin = dict(asked.given), [], 0
    for end in ends:
        part = {name: _part(name, value, begin, end, asked) for name, value in given.items()}
        if begin:  # images and the like are the prompt's
            extra = [n for n, v in part.items() if isinstance(v, torch.Tensor) and n not in _ALONG]
            part |= {name: None for name in extra if name not in (*_ENCODED, "attention_mask")}
        with entered(None if end == settled else single):
            out = run(**part)
        name = next((n for n in CACHES if isinstance(out, Mapping) and out.get(n) is not None), None)
        if name is None:
            raise _unparted("an output without its cache by name", "return a ModelOutput, or give tokens one by one")
        given[next((n for n in CACHES if n in given), name)] = out[name]
        outs.append(out)
        begin = end
    return _joined(outs, asked.given.get("logits_to_keep") or 0)


def _part(name: str, value: Any, begin: int, end: int, asked: Several) -> Any:
    """An argument for the tokens begin .. end - 1 of the call."""
    if name == "logits_to_keep" and value:
        return max(1, min(value - (asked.tokens - end), end - begin))
    if name == "attention_mask":
        return _mask(value, begin, end, asked)
    if name in _ALONG and isinstance(value, torch.Tensor):
        return _alone(value.narrow(_ALONG[name], begin, end - begin))
    return value


def _mask(mask: Any, begin: int, end: int, asked: Several) -> Any:
    """[B, T], or [B, H, S, T] and dicts of those, up to the last of these tokens."""
    if isinstance(mask, Mapping):
        return {kind: _mask(one, begin, end, asked) for kind, one in mask.items()}
    if mask is None:
        return mask
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
        raise _unparted(f"an attention_mask of type {type(mask).__name__}", "give it as [B, T] or [B, H, S, T]")
    later = asked.tokens - end
    if mask.dim() == 2:
        return _alone(mask[:, : mask.shape[1] - later])
    return _alone(mask[:, :, begin:end, : mask.shape[3] - (0 if asked.room else later)])


def _alone(part: torch.Tensor) -> torch.Tensor:
    """As `generate` gives it: Dynamo would compile a graph for each stride and offset of a view."""
    return part.clone(memory_format=torch.contiguous_format)


def _joined(outs: list[Any], logits: int) -> Any:
    """One output of several, along the tokens."""
    last = outs[-1]
    fields: dict[str, Any] = {}
    for name, value in last.items():
        values = [out.get(name) for out in outs]
        if name in _JOINED:
            whole = torch.cat(values, 1)
            fields[name] = whole[:, -logits:] if name == "logits" and logits else whole
        elif name.endswith("hidden_states") and not name.startswith("encoder"):
            fields[name] = tuple(torch.cat(layers, 1) for layers in zip(*values, strict=True))
        elif name in CACHES or name.startswith("encoder"):
            fields[name] = value
        else:
            raise _unparted(f"the output {name}", "ask for logits and hidden states only")
    return type(last)(**fields)


def _unparted(name: str, hint: str) -> CacheError:
    return CacheError(f"{name}: not in a call of several tentative tokens", where="kvpass.tentative", hint=hint)
