"""What a cache holds and why: `report`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvpass.api.holdings import Holdings, Part, holdings
from kvpass.api.report_text import report_text
from kvpass.api.retention import retention
from kvpass.api.spans import Spans, span_rows
from kvpass.errors import CacheError
from kvpass.kernels.budget import Apart, Budget
from kvpass.kernels.slots.cursor import SEEN
from kvpass.runtime.course import held, together
from kvpass.runtime.recordings import StepCounts
from kvpass.runtime.shell import attached
from kvpass.runtime.store import SlotStore


@dataclass(frozen=True)
class Report:
    """What a cache holds. `str()` is a table, `to_dict()` the plain `data`."""

    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every row of it.

        Keys:
            policy, budget: of who made the cache.
            part: under tensor parallelism, `rank 0 of 2`: whose heads all bytes and counts here are of; "" otherwise.
            tokens: seen so far, padding included; None where nothing is compressed.
            bytes, dense_bytes: held by all keys, values and states of the cache (what forks of it share counts
                once), and by those of an unmodified one.
            slot_bytes, overhead_bytes: of keys and values in slots; of their positions and statistics (not in `bytes`).
            bits: of those together, for each number of a key or value that is kept; None if none is.
            caller_bytes: of full-length buffers that the caller allocated, and that only the caller can free.
            coded: whether slots hold codes (`store` of a policy).
            sites: compressed ones. dense: what else holds keys, values or states.
            declined: sites that stay dense, and why.
            why: why less was evicted than the budget says, in words; "" if it was not.
            proof: `calls` made on this cache; keys `evicted` (summed over layers, rows and KV heads) of those `seen`;
            where some are, also those `demoted`, held as codes alone; `freed` bytes; `outside`: how often slots were
            changed after a call, outside the compiled graph.
            steps: under `mode="reduce-overhead"`, `captures` of CUDA graphs, `replays` of them, `eager` steps beside
            those, and `why` the last of these was; of the graph with the most, where a model has several.
            course: [tokens, bytes] after calls at which the bytes of slots changed, `overhead_bytes` with them, oldest
                first and the present last: a call of a prompt in the middle of its work held more. Tokens that were
                taken back are not in it; what was loaded from a file, or joined of several caches, begins there.
            providers: on a CUDA device, who computed the attention of prompts, by kinds of calls in words: of all
            models of this process.
            spans: for each one that was asked for, in each row: `kept`, the share of its `tokens` that is kept, over
            all `heads` of all layers; `gone`, how many no head holds; `lost`, whether that is all of them.
        """
        return self.data

    def __str__(self) -> str:
        return report_text(self.data)


def report(cache: Any, spans: Spans | None = None) -> Report:
    """Bytes, slots and declined sites of a cache that a kvpass-compiled model returned: of all of it, with what is left
    dense and what the caller allocated.

    Args:
        cache: `out.cache` (`out.past_key_values` before transformers 5.24), a model's whole output, a tuple cache, or a
            module that holds its cache in attributes.
        spans: tokens to look for, by name: `{"code": (120, 131)}`, columns [start, stop) of the cache, padding counted,
            in all rows; or a list of those, one for each row (None: not in this one). Says how much of each is kept,
            and whether one is gone in all heads: what only it said, the model cannot answer any more.

    Raises:
        CacheError: no kvpass-compiled model made it; with `spans`, nothing in it is compressed, or one is out of range.
    """
    found = holdings(cache)
    if not found.stores and found.left is None:
        raise _not_ours(cache)
    sites = [_site_row(store) for store in found.stores]
    own = found.states
    slots, overhead = sum(store.bytes for store in own), sum(store.overhead_bytes for store in own)
    dense_sites = sum(store.dense_bytes for store in found.stores)
    callers, dense = (sum(part.bytes for part in parts) for parts in (found.buffers, found.dense))
    origins = [store.origin for store in found.stores] or [o for o in (found.left,) if o is not None]
    return Report(
        {
            "policy": origins[0].policy,
            "budget": origins[0].budget,
            "part": origins[0].part,
            "tokens": max((store.tokens for store in found.stores), default=None),
            "bytes": found.bytes,
            "dense_bytes": dense_sites + dense + _unused(found),
            "slot_bytes": slots,
            "overhead_bytes": overhead,
            "bits": _bits(found.stores),
            "coded": any(_coded(store) for store in found.stores),
            "caller_bytes": callers,
            "sites": sites,
            "dense": _dense_rows(found.dense),
            "declined": list({d["site"]: d for origin in origins for d in origin.declined}.values()),
            "why": _why(found.stores),
            "proof": _proof(found.stores, dense_sites - slots - callers),
            "steps": max((store.steps for store in found.stores), key=_made, default=StepCounts())._asdict(),
            "course": _course(found.stores),
            "providers": _providers(),
            "spans": span_rows(spans, retention(cache)) if spans else [],
        }
    )


def _providers() -> dict[str, str]:
    """Known once a kernel of a device has run; importing them would import triton."""
    choose = sys.modules.get("kvpass.kernels.prefill_attend.providers.choose")
    return choose.decisions() if choose is not None else {}


def _course(stores: Sequence[SlotStore]) -> list[list[int]]:
    now = (max((store.tokens for store in stores), default=0), held(stores))
    return [list(one) for one in together([store.course for store in stores if store.course.changes], now)]


def _made(steps: StepCounts) -> int:
    return steps.replays + steps.eager


def _unused(found: Holdings) -> int:
    """Bytes of the caller's buffers that are none of the stores': other layers or rows of the same memory."""
    stores = {id(store): store for part in found.buffers for store in attached(part.tensor)}
    return max(0, sum(part.bytes for part in found.buffers) - sum(store.dense_bytes for store in stores.values()))


def _not_ours(cache: Any) -> CacheError:
    return CacheError(
        f"no kvpass-compiled model made this {type(cache).__name__}",
        hint="pass the cache that a kvpass-compiled model returned (generate with return_dict_in_generate=True); if "
        "it did, no attention with a cache was found in it: print(kvpass.explain(model, **inputs))",
    )


def _site_row(store: SlotStore) -> dict[str, Any]:
    live = store.live()
    return {
        "site": store.name,
        "layer": store.layer,
        "slots": store.slots,
        "live_min": int(live.min()),
        "live_max": int(live.max()),
        "bytes": store.bytes,
        "dense_bytes": store.dense_bytes,
        "overhead_bytes": store.overhead_bytes,
    }


def _demoted(store: SlotStore) -> int:
    """Keys that are held as codes alone, summed over rows and KV heads."""
    if not store.rule.demotes:
        return 0
    from kvpass.kernels.codecs.storage import WHOLE_AT

    return int(store.live().sum() - (store.state[WHOLE_AT] >= 0).sum())


def _coded(store: SlotStore) -> bool:
    from kvpass.kernels.codecs.storage import coded  # all codecs with it: not when kvpass is imported

    return bool(coded(store.rule))


def _bits(stores: Sequence[SlotStore]) -> float | None:
    """Bits of all that slots hold, for each number that they stand for."""
    held = sum(store.bytes + store.overhead_bytes for store in stores)
    numbers = sum(int(s.live().sum()) * (s.state.k.shape[3] + s.state.v.shape[3]) for s in stores)
    return 8 * held / numbers if numbers else None


def _dense_rows(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """What lies side by side in one row: the keys and values of a layer."""
    rows: dict[str, list[Part]] = {}
    for part in parts:
        rows.setdefault(part.place, []).append(part)
    return [
        {"place": place, "shape": list(some[0].tensor.shape), "bytes": sum(part.bytes for part in some)}
        for place, some in rows.items()
    ]


def _proof(stores: Sequence[SlotStore], freed: int) -> dict[str, int]:
    evicted, demoted = (sum(count(store) for store in stores) for count in (SlotStore.evicted, _demoted))
    return {
        "calls": max((store.calls for store in stores), default=0),
        "evicted": evicted,
        **({"demoted": demoted} if demoted else {}),
        "seen": evicted + sum(int(store.live().sum()) for store in stores),
        "freed": max(0, freed),
        "outside": sum(store.outside for store in stores),
    }


def _why(stores: Sequence[SlotStore]) -> str:
    """Why a cache holds more than its budget says, or everything."""
    waiting = max((store.unplayed for store in stores), default=0)
    if waiting:
        return f"the last {waiting} tokens wait for kvpass.replay(model, cache, ids): nothing goes before"
    rules = [(store.rule, int(store.state.cursor[..., SEEN].max())) for store in stores]
    shares = [(rule, seen) for rule, seen in rules if rule.evicts and not rule[Budget].slots]
    floors = {
        rule[Budget].floor
        for rule, seen in shares
        if (rule[Budget].floor + rule[Apart].apart) * rule[Budget].den > seen * rule[Budget].num
    }
    if floors:
        what = "tokens whole" if all(rule.demotes for rule, _ in shares) else "slots"
        slots = " or ".join(map(str, sorted(floors)))
        return (
            f"more than the budget: however few tokens there are, each KV head keeps {slots} {what} (min_slots), "
            "and up to 2.5 % are free to grow into"
        )
    if any(store.evicted() or _demoted(store) for store in stores) or not stores:
        return ""
    if not any(rule.evicts for rule, _ in rules):
        return "this policy keeps everything"
    if all(rule[Budget].slots >= seen for rule, seen in rules if rule[Budget].slots):
        return "the budget has room for every token so far"
    return "this policy has not evicted yet: it waits for more tokens, or for another call"
