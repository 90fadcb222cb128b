"""One family with one attention implementation: does it run, what is matched, and is the outcome right?"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from families import build
from feed import STEPS, Feed, NoCache, full_layers, kv_layers, prompt
from masks import said
from oracle.anyhf import AnyOracle
from oracle.drive import compare_logits
from overrides import ONE_HEAD

import kvpass
from kvpass.errors import CacheError

BUDGET, FLOOR = 0.25, 8
H2O = {
    "name": "h2o",
    "observe": {"queries": "all", "group": "mean"},
    "statistic": {"keep": ["sum"], "across_calls": "add", "decode": "add"},
    "score": "sum",
    "protect": {"recent": 0.5},
    "min_slots": FLOOR,
}
IDENTITY = 1e-4
LATER = 2  # calls after the prefill in which Dynamo still makes graphs

Result = dict[str, Any]


def run(
    family: str,
    attention: str,
    save: Callable[[Result], None] = lambda _: None,
    skip: tuple[str, ...] = (),
    other: bool = False,
) -> Result:
    """All checks but those to `skip`, in order; `save` is handed the result after each, for those who may not see the
    end. `other`: the family's second shape.
    """
    torch._dynamo.reset()
    result: Result = {"status": "building"} | ({"other": True} if other else {})
    start = time.perf_counter()
    try:
        model = build(family, attention, other)
    except Exception as error:
        return {"status": "no_sdpa" if "scaled_dot_product" in str(error) else "not_built", "why": short(error)}
    result |= {"status": "running", "model": type(model).__name__}
    save(result)
    expected = unmodified(model, result)
    if expected is not None:
        for name, check in CHECKS.items():
            result["status"] = f"checking {name}"
            save(result)
            if name not in skip:
                if name == "graphs":  # as many as of a model that was never compiled
                    torch._dynamo.reset()
                result[name] = guarded(check, family, model, expected, result)
        result |= {name: {"skipped": True} for name in skip}
        result["status"] = "ran"
    result["seconds"] = round(time.perf_counter() - start, 1)
    save(result)
    return result


def short(error: BaseException) -> str:
    """One line; for what Dynamo wraps, the error inside."""
    error = getattr(error, "inner_exception", error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def unmodified(model: Any, result: Result) -> list[torch.Tensor] | None:
    """Logits of the model itself; None, and why, if it does not run with a KV cache."""
    try:
        feed = Feed(model)
        logits = feed.greedy(*prompt())
        other = Feed(model).greedy(*prompt(filler=7))
        result["padded"] = max(map(difference, logits, other)) <= IDENTITY
        if not result["padded"]:  # what it says of its tokens depends on its padding, so that is no use as a reference
            feed = Feed(model)
            logits = feed.greedy(*prompt(padded=False))
    except NoCache as error:
        result |= {"status": "no_cache", "why": str(error)}
        return None
    except Exception as error:
        result |= {"status": "does_not_run", "why": short(error)}
        return None
    layers, full = kv_layers(feed.cache), full_layers(feed.cache)
    result["layers"] = {"full": len(full), "sliding": len(layers) - len(full)}
    if not layers:
        kind = type(feed.cache).__name__ if feed.cache is not None else "nothing"
        result |= {"status": "no_cache", "why": f"keeps no keys and values ({kind})"}
    elif not full:
        result |= {"status": "no_full_attention", "why": "every layer has a sliding window"}
    elif not all(torch.isfinite(t).all() for t in logits):
        result |= {"status": "does_not_run", "why": "the unmodified model gives NaN"}
    else:
        return logits
    return None


def guarded(check: Callable[..., Result], *args: Any) -> Result:
    """The check's outcome; an exception is a failure and says so."""
    try:
        return {"ok": True, **check(*args)}
    except Exception as error:
        return {"ok": False, "why": short(error)}


def identity(family: str, model: Any, expected: list[torch.Tensor], result: Result) -> Result:
    """A full budget changes nothing: same greedy tokens, same logits. Also tells what was matched."""
    compiled = kvpass.compile(model, policy="full", inner="eager", strict=False)
    feed, worst = Feed(model, compiled), 0.0
    ids, mask = prompt(result["padded"])
    made = result["graphs_so_far"] = []
    for step, theirs in enumerate(expected):
        ours = feed(ids, mask if step == 0 else None)
        made.append(len(compiled.kvpass.graphs))
        found(result, made, compiled.kvpass.graphs)
        gap = difference(ours, theirs)
        assert gap <= IDENTITY, f"step {step}: logits differ by {gap:.2g} of the largest"
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1)), f"step {step}: other tokens"
        worst, ids = max(worst, gap), theirs.argmax(-1, keepdim=True)
    return {"gap": float(f"{worst:.2g}")}


def found(result: Result, made: list[int], graphs: list[Any]) -> None:
    """Sites matched and declined, by phase: the prefill's graphs, then those of the first decode call."""
    if len(made) > 2:
        return
    new = graphs[[0, *made][-2] :]
    reasons = Counter(d.reason.value for record in new for d in record.table.declined)
    matched = sum(len(record.table.sites) for record in new)
    result["prefill" if len(made) == 1 else "decode"] = {"matched": matched, "declined": dict(sorted(reasons.items()))}


def graphs(family: str, model: Any, expected: list[torch.Tensor], result: Result) -> Result:
    """kvpass adds no graph break: Dynamo made no more graphs for it than for a backend that does nothing. Also tells
    how far torch.compile alone is from the model."""
    count: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        count.append(gm)
        return gm.forward

    plain = copy.copy(model)
    plain.compile(backend=backend)
    feed, ids, mask, before, worst = Feed(model, plain), *prompt(result["padded"]), [], 0.0
    for step, theirs in enumerate(expected[: LATER + 1]):
        worst = max(worst, difference(feed(ids, mask if step == 0 else None), theirs))
        before.append(len(count))
        ids = theirs.argmax(-1, keepdim=True)
    if worst > IDENTITY:
        result["torch_compile"] = f"torch.compile without kvpass differs from the model too, by {worst:.2g}"
    after = result["graphs_so_far"]
    more = any(with_kvpass > alone for alone, with_kvpass in zip(before, after, strict=False))
    assert not more, f"graphs after each call: {before}; with kvpass {after}"
    return {}


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference of logits, relative to the largest logit."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def eviction(family: str, model: Any, expected: list[torch.Tensor], result: Result) -> Result:
    """At a quarter of the tokens every matched layer, row and head keeps what the naive oracle keeps."""
    return against_oracle(family, model, "h2o", result)


def against_oracle(family: str, model: Any, policy: str, result: Result) -> Result:
    """kvpass' h2o and the oracle's `policy` through the same conversation, compared after each call."""
    compiled = kvpass.compile(model, policy=H2O, budget=BUDGET, inner="eager", strict=False)
    ours, ids, mask = Feed(model, compiled), *prompt(result["padded"])
    logits = ours(ids, mask)
    evicting = set(kept(ours.cache))
    if not evicting:
        return {"ok": None, "why": "nothing is matched"}
    plain = build(family, "eager", result.get("other", False))
    plain.load_state_dict(model.state_dict())
    oracle = AnyOracle(plain, policy, BUDGET, FLOOR, evicting, family in ONE_HEAD)
    theirs = Feed(plain, oracle)
    for step in range(STEPS + 1):
        naive = theirs(ids, mask if step == 0 else None)
        held = kept(ours.cache)
        oracle.simulator.follow([as_one(held[i]) if oracle.one_head else held[i] for i in sorted(held)])
        compare_logits(logits, naive)
        result["bytes"] = guarded(bytes_held, ours.cache)
        ids = logits.argmax(-1, keepdim=True)
        logits = ours(ids) if step < STEPS else logits
    simulator = oracle.simulator
    return {"layers": len(evicting), "compared": simulator.compared, "near_ties": simulator.near_ties}


def kept(cache: Any) -> dict[int, torch.Tensor]:
    """Positions held by each layer that evicts."""
    return {i: found.layers[0].positions for i, found in views(cache).items()}


def as_one(positions: torch.Tensor) -> torch.Tensor:
    assert (positions == positions[:, :1]).all(), "heads that share one choice hold different tokens"
    return positions[:, :1]


def views(cache: Any) -> dict[int, Any]:
    found = {}
    for i, layer in kv_layers(cache).items():
        try:
            found[i] = kvpass.inspect(layer)
        except CacheError:
            continue
    return found


def bytes_held(cache: Any) -> Result:
    """Slots and bytes of each layer are what docs/concepts.md says of this budget, and the dense tensors are gone."""
    held = 0
    for i, layer in kv_layers(cache).items():
        if i not in kept(cache):
            continue
        data = kvpass.report(layer).to_dict()
        (site,) = data["sites"]
        n = min(max(FLOOR, int(data["tokens"] * BUDGET)), data["tokens"])
        assert n <= site["slots"] <= n + max(1, n // 40), f"layer {i}: {site['slots']} slots, the budget says {n}"
        per_slot = sum(t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in (layer.keys, layer.values))
        assert site["bytes"] == site["slots"] * per_slot, f"layer {i}: {site['bytes']} bytes"
        real = max(t.untyped_storage().nbytes() for t in (layer.keys, layer.values))
        assert real <= layer.keys.element_size(), f"layer {i}: the cache still holds {real} bytes"
        held += site["bytes"]
    return {"held": held, "dense": sum(site["dense_bytes"] for site in kvpass.report(cache).to_dict()["sites"])}


def masks(family: str, model: Any, expected: list[torch.Tensor], result: Result) -> Result:
    """What masks were taken for, by phase; nothing as wide as a mask is left where all are proved."""
    torch._dynamo.reset()
    return {"said": said(model, result["padded"])}


CHECKS = {"identity": identity, "eviction": eviction, "masks": masks, "graphs": graphs}
