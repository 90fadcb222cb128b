"""Tokens of a cache fed again behind it, chunk by chunk; then what waited for it is evicted (docs/design/0021)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from kvpass.errors import CacheError
from kvpass.kernels.rank.replay import Replay
from kvpass.kernels.slots.cursor import SEEN
from kvpass.runtime.attributes import DEEPEST
from kvpass.runtime.drafts import entered
from kvpass.runtime.instruction import Instruction, instruction
from kvpass.runtime.questions import arrived, staying, unread
from kvpass.runtime.replaying import Replaying
from kvpass.runtime.shell import find
from kvpass.runtime.steps.share_slots import share_out
from kvpass.runtime.store import SlotStore
from kvpass.runtime.watch import tensors

Feed = Callable[[torch.Tensor, torch.Tensor], Any]
"""Makes a call with tokens, int64 [B, S], of which some are there, bool [B, S], the others padding behind them."""

OWN = {"keys", "values", "_sliding_window_tensor"}
"""Tensors of a cache's layers that calls replace, and do not change in place."""


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

    Raises:
        CacheError: the cache took other tokens of the rows than those that are valid.
    """
    first, held = waiting[0], _held(host)
    counts = valid.sum(-1, keepdim=True).cpu()
    before = first.tokens - first.unplayed
    came = arrived(first, before).cpu()
    if not bool((counts == came).all()):
        raise CacheError(
            f"{counts.flatten().tolist()} tokens of the rows are said to be no padding, but the cache took "
            f"{came.flatten().tolist()}",
            where=first.name,
            hint="give the ids and the mask of the cache's last call: kvpass.replay(model, cache, ids, mask=mask)",
        )
    begin, short = first.state.cursor[:, :1, SEEN].cpu() - counts, unread(first, before)
    told, whole = valid & ~short.to(valid.device)[:, None], staying(first, before)
    for probe in probes(ids, told, first.rule[Replay].replay, instruction()):
        block = Replaying.of((probe.repeated + begin).int())
        try:
            with entered(block), torch.no_grad():
                feed(probe.ids, probe.there)
        finally:
            block.undo()
            _put_back(held)
    try:
        with torch.inference_mode(False), torch.no_grad():
            share_out(waiting, first.tokens, whole)
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
