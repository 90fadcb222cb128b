"""The tokens of a call, fed again behind it: what a policy with `observe: {replay: repeat}` waits for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kvpass.errors import CacheError
from kvpass.kernels.rank.replay import Replay
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.slots.cursor import SEEN
from kvpass.model.asked import CACHES, cache_in, is_tokens
from kvpass.runtime.attributes import DEEPEST
from kvpass.runtime.drafts import entered
from kvpass.runtime.replaying import Replaying
from kvpass.runtime.shell import find
from kvpass.runtime.steps.share_slots import share_out
from kvpass.runtime.store import SlotStore
from kvpass.runtime.watch import tensors

Feed = Callable[[torch.Tensor, torch.Tensor], Any]
"""Makes a call with tokens, int64 [B, S], of which some are there, bool [B, S], the others padding behind them."""

OWN = {"keys", "values", "_sliding_window_tensor"}
"""Tensors of a cache's layers that calls replace, and do not change in place."""


@dataclass(frozen=True)
class Instruction:
    """Tokens that stand before the chunks of a prompt that is read again.

    Attributes:
        first: before the first chunk.
        later: before each other one, and the `tail` last tokens of the chunk before it.
        tail: how many.
    """

    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    tail: int = 8


_NONE = Instruction()
_CURRENT: ContextVar[Instruction] = ContextVar("kvpass_instruction", default=_NONE)


@contextmanager
def instructed(first: Sequence[int] = (), later: Sequence[int] | None = None, tail: int = 8) -> Iterator[None]:
    """Let prompts that are read again inside the block (policies that replay, e.g. `kvzip`) follow an instruction:
    `with kvpass.instructed(tokenizer("\\n\\nRepeat the previous context exactly.").input_ids): model.generate(..)`.

    Args:
        first: token ids before the first chunk of each call's tokens.
        later: before every other chunk; None: as `first`.
        tail: so many tokens of the chunk before come behind `later`, also where there is no instruction.

    Raises:
        CacheError: they are no token ids, or tail is no whole number from 0.
    """
    given = [_ids(first), _ids(first if later is None else later)]
    if not isinstance(tail, int) or isinstance(tail, bool) or tail < 0:
        raise CacheError(f"tail={tail!r} is no number of tokens", where="kvpass.instructed", hint="say tail=8")
    token = _CURRENT.set(Instruction(given[0], given[1], tail))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def _ids(given: Any) -> tuple[int, ...]:
    ids = torch.as_tensor(given).tolist() if len(given) else []
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
        raise CacheError("an instruction is no list of token ids", where="kvpass.instructed", hint="give input_ids[0]")
    return tuple(ids)


class Probe(NamedTuple):
    """One call that repeats a chunk of each row."""

    ids: torch.Tensor
    """int64 [B, S]"""
    there: torch.Tensor
    """bool [B, S]; the others are padding, behind."""
    repeated: torch.Tensor
    """int32 [B, 2], from which to below which of the row's given tokens; equal for rows that have no such chunk."""


def probes(ids: torch.Tensor, valid: torch.Tensor, chunk: int, said: Instruction) -> Iterator[Probe]:
    """The calls that read tokens again: ids int [B, T], valid bool [B, T]; each row's chunks are of its own tokens."""
    rows = [row[keep].tolist() for row, keep in zip(ids.cpu(), valid.cpu(), strict=True)]
    for begin in range(0, max(map(len, rows)), chunk):
        parts = [row[begin : begin + chunk] for row in rows]
        tails = [row[max(0, begin - said.tail) : begin] for row in rows]
        head = list(said.later if begin else said.first)
        given = [head + tail + part if part else [] for tail, part in zip(tails, parts, strict=True)]
        width = max(2, *map(len, given))  # one token alone would be a step
        filled = [one + [0] * (width - len(one)) for one in given]
        there = [[at < len(one) for at in range(width)] for one in given]
        repeated = torch.tensor([[begin, begin + len(part)] for part in parts], dtype=torch.int32)
        yield Probe(torch.tensor(filled, device=ids.device), torch.tensor(there, device=ids.device), repeated)


def read_again(waiting: Sequence[SlotStore], host: Any, ids: torch.Tensor, valid: torch.Tensor, feed: Feed) -> None:
    """Replay the last tokens of stores that wait for it, and let them evict.

    Args:
        waiting: the stores, by layer.
        host: the object that holds them, which comes out as it went in.
        ids, valid: int and bool [B, T], the tokens; those that are not valid are padding.
        feed: makes a call that goes on from the host.
    """
    first, held = waiting[0], _held(host)
    begin = first.state.cursor[:, :1, SEEN].cpu() - valid.sum(-1, keepdim=True).cpu()
    for probe in probes(ids, valid, first.rule[Replay].replay, _CURRENT.get()):
        block = Replaying.of((probe.repeated + begin).int())
        try:
            with entered(block), torch.no_grad():
                feed(probe.ids, probe.there)
        finally:
            block.undo()
            _put_back(held)
    try:
        with torch.inference_mode(False), torch.no_grad():
            for share in dict.fromkeys(store.rule[ShareOut].share for store in waiting):
                share_out([store for store in waiting if store.rule[ShareOut].share == share], first.tokens)
    except BaseException:
        for store in waiting:
            store.spoiled = True
        raise
    for store in waiting:
        store.unplayed = 0


def waiting_in(host: Any) -> list[SlotStore]:
    """Stores of a cache whose last tokens were not replayed yet, by layer."""
    found = {id(store): store for one in tensors(host) if (store := find(one.tensor)) is not None and store.unplayed}
    return sorted(found.values(), key=lambda store: store.layer)


def after_call(
    run: Callable[..., Any], module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> None:
    """Replay what a call of a model of transformers brought, if it says its tokens; else they wait for `kvpass.replay`.

    Args:
        run: makes another call of the same function.
        module: whose forward was called, for the names of its arguments.
        result: what the call returned.

    Raises:
        CacheError: the cache holds states that a replay would change.
    """
    names = list(inspect.signature(module.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    ids, cache = given.get("input_ids"), cache_in(given)
    cache = cache_in(result) if cache is None and isinstance(result, Mapping) else cache
    if cache is None or not is_tokens(ids) or not set(CACHES) & {*names, *given} or "decoder_input_ids" in names:
        return
    waiting = waiting_in(cache)
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if not waiting or waiting[0].unplayed != ids.shape[1]:
        return
    flat = isinstance(mask, torch.Tensor) and mask.shape == (len(ids), waiting[0].tokens)
    if not (mask is None or flat) or not (positions is None or positions.dim() == 2):
        return
    refuse_states(cache)
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[1] :] != 0
    name = next(one for one in CACHES if one in given or one in names)
    fixed: dict[str, Any] = {name: cache, "use_cache": True}
    if "logits_to_keep" in names:
        fixed["logits_to_keep"] = 1

    def feed(more: torch.Tensor, there: torch.Tensor) -> Any:
        return run(**fixed, **_along(given, waiting[0], valid, more, there))

    read_again(waiting, cache, ids, valid, feed)


def _along(
    given: Mapping[str, Any], store: SlotStore, valid: torch.Tensor, ids: torch.Tensor, there: torch.Tensor
) -> dict[str, Any]:
    """The arguments of a call with other tokens behind those of the last one."""
    mask, positions, count = given.get("attention_mask"), given.get("position_ids"), ids.shape[1]
    out: dict[str, Any] = {"input_ids": ids}
    if mask is not None or not bool(there.all()):
        before = torch.ones(len(ids), store.tokens, dtype=torch.long, device=ids.device) if mask is None else mask
        out["attention_mask"] = torch.cat([before, there.to(before)], 1)
    if positions is not None:
        last = torch.where(valid, positions.expand(len(ids), -1), -1).amax(-1, keepdim=True)
        out["position_ids"] = last + 1 + torch.arange(count, device=positions.device)
    if given.get("cache_position") is not None:
        out["cache_position"] = torch.arange(store.tokens, store.tokens + count, device=ids.device)
    return out


def refuse_states(cache: Any) -> None:
    """Raises CacheError if layers of a cache hold more than keys and values: what calls change in place."""
    for at, layer in enumerate(getattr(cache, "layers", ())):
        more = {name for name, one in vars(layer).items() if isinstance(one, torch.Tensor)} - OWN
        if more:
            raise CacheError(
                f"layer {at} holds {', '.join(sorted(more))}, which a replay would change",
                where=f"a policy that replays prompts, and a {type(cache).__name__}",
                hint="choose one that does not, e.g. snapkv; there is no way yet to take such states back",
            )


def _held(host: Any) -> list[tuple[Any, Any]]:
    """Lists and dicts in an object, attributes too, and copies of them."""
    found: list[tuple[Any, Any]] = []
    _visit(host, found, set(), 0)
    return found


def _visit(value: Any, found: list[tuple[Any, Any]], seen: set[int], depth: int) -> None:
    if isinstance(value, (torch.Tensor, torch.nn.Module, type, str)) or id(value) in seen or depth > DEEPEST:
        return
    seen.add(id(value))
    own = value if isinstance(value, (list, dict)) else getattr(value, "__dict__", None)
    if own is not None:
        found.append((own, own.copy()))
    parts = own.values() if isinstance(own, dict) else value if isinstance(value, (list, tuple)) else ()
    for part in list(parts):
        _visit(part, found, seen, depth + 1)


def _put_back(held: list[tuple[Any, Any]]) -> None:
    for own, copied in held:
        if isinstance(own, list):
            own[:] = copied
        else:
            own.clear()
            own.update(copied)
