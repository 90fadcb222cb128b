"""Policy -> Rule: the records that the ops read. A rule that can never evict observes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from kvpass.errors import PolicyError
from kvpass.kernels.after_call.reindex import Reindex
from kvpass.kernels.attention.observation import Observation
from kvpass.kernels.budget import Budget
from kvpass.kernels.codecs.storage import Storage
from kvpass.kernels.exits.record import NEAREST_POSITION, Merge
from kvpass.kernels.exits.refit import Refit
from kvpass.kernels.rank.allocate import Heads
from kvpass.kernels.rank.criterion import INF, SCORED, SCORES, Ranking, Scope
from kvpass.kernels.rank.layer import Layer
from kvpass.kernels.rank.marks import MARK, Marks
from kvpass.kernels.rank.places import NUMBER, PLACE, Protected
from kvpass.kernels.rank.pyramid import Pyramid
from kvpass.kernels.rank.replay import Replay
from kvpass.kernels.rank.rings import RING, Rings
from kvpass.kernels.rank.scored import Sample, Scoring
from kvpass.kernels.rank.scorers.registry import encode_options, find_scorer
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rank.smooth import Fair, Granule, Pool
from kvpass.kernels.rank.weights import WEIGHT, Weight
from kvpass.kernels.rule import Record, Rule
from kvpass.kernels.slots.ragged import Ragged
from kvpass.kernels.slots.statistics import Statistics
from kvpass.kernels.timing import Timing
from kvpass.plan.byte_budget import EXAMPLE, Entry, in_bytes, least_share
from kvpass.policy.check import fraction
from kvpass.policy.layers import of_layer
from kvpass.policy.spec import Spec

SHARES = {"flat": "model", "preference": "preference"}
"""`ShareOut.share` of `allocate.layers`."""

SHARES_OF_REPLAYS = {("flat", "uniform"): "model", ("uniform", "flat"): "heads", ("uniform", "uniform"): "even"}
"""The same where eviction waits for a replay, of `allocate.layers` and `allocate.heads`."""


def rule_of(policy: Spec, layer: int = 0, layers: int = 1, entry: Entry = EXAMPLE) -> Rule:
    """The rule of a policy with a checked budget, for one layer of a model that has so many. entry: what its cache
    holds, for budgets in bytes.
    """
    policy = of_layer(policy, layer, layers)
    if policy.keeps_all:
        return Rule(_stored(policy, policy.store.k, policy.store.v, entry))
    return Rule(*_records(policy, layer, layers, entry))


def _records(policy: Spec, layer: int, layers: int, entry: Entry) -> Iterator[Record]:
    """In the order of a rule's text."""
    allocate, scored = policy.allocate, policy.score not in SCORES
    yield Statistics(tuple(_kept(policy)))
    yield _observation(policy)
    if policy.pool:
        yield Pool(policy.pool.kind, policy.pool.size)
    yield Ranking(SCORED if scored else policy.score, policy.observe.heads)
    yield _scoring(policy)
    if scored and policy.granule:
        yield Granule(policy.granule.size, policy.granule.by)
    yield Sample(*_share(policy.sample))
    yield _weight(policy)
    yield Scope(*_share(policy.scope))
    yield _protected(policy)
    yield from _budget(policy, entry)
    yield Rings(allocate.rings)
    yield _layer(policy, layer, layers)
    yield Pyramid(allocate.beta if allocate.layers == "pyramid" else 0)
    yield Ragged(_ragged(policy))
    yield _heads(policy)
    yield _share_out(policy)
    yield _replay(policy)
    yield Marks(policy.protect.tokens or policy.fair)
    yield Timing(policy.when, policy.every, policy.shortest)
    yield Reindex(policy.positions == "reindexed")
    yield Fair(policy.fair)
    yield _merge(policy)
    yield _refit(policy)
    yield _storage(policy, entry)


def _kept(policy: Spec) -> Iterator[str]:
    """Statistics that slots keep."""
    if policy.score in SCORES:
        yield from policy.statistic.keep
    else:
        yield SCORED
    if policy.weight is not None:
        yield WEIGHT
    if policy.protect.tokens or policy.fair:
        yield MARK
    if policy.positions == "reindexed":
        yield PLACE
    if _numbered(policy):
        yield NUMBER
    if policy.allocate.rings:
        yield RING


def _observation(policy: Spec) -> Observation:
    observe, statistic = policy.observe, policy.statistic
    scored = policy.score not in SCORES
    return Observation(
        emits=statistic.keep if scored else (),
        queries=-1 if observe.queries == "all" else observe.queries,
        group=observe.group,
        carry=statistic.across_calls == "add",
        decode=statistic.decode if statistic.keep and not scored else "none",
    )


def _scoring(policy: Spec) -> Scoring:
    if policy.score in SCORES:
        return Scoring(seed=policy.seed)
    reads = find_scorer(policy.score).reads
    return Scoring(policy.score, encode_options(policy.options), reads, policy.decay, policy.seed)


def _share_out(policy: Spec) -> ShareOut:
    allocate = policy.allocate
    if policy.replays:
        return ShareOut(SHARES_OF_REPLAYS[allocate.layers, allocate.heads])
    threshold = allocate.heads == "threshold"
    share = "threshold" if threshold else SHARES.get(allocate.layers, "")
    return ShareOut(share, allocate.threshold if threshold else -INF)


def _replay(policy: Spec) -> Replay:
    if not policy.replays:
        return Replay()
    options = {**find_scorer(policy.score).options, **policy.options}
    return Replay(int(options["chunk"]), bool(options["normed"]), bool(options["summed"]))


def _merge(policy: Spec) -> Merge:
    """Of the words that its other words ask for alone: policies that mean the same have one rule."""
    said = policy.evicted.merge
    if said is None:
        return Merge()
    return Merge(
        said.into,
        said.halves,
        said.weight,
        said.mean,
        said.gate,
        said.threshold,
        said.count if said.into == "next" else 1,
        said.sigma if said.weight == "gaussian" else 1.0,
        said.at,
        said.bias,
    )


def _refit(policy: Spec) -> Refit:
    said = policy.evicted.refit
    return Refit() if said is None else Refit(said.queries, *said.bias, said.iters, said.ridge, said.values)


def _numbered(policy: Spec) -> bool:
    """Whether slots must know which of their row's tokens they are: where old ones are told apart by it, or a protected
    window may reach back over what has gone (marked tokens that went, heads whose windows grow by turns); where what
    goes is drawn by it, or looks for the nearest.
    """
    merge = policy.evicted.merge
    if merge is not None and (merge.gate == "chance" or merge.into == NEAREST_POSITION):
        return True
    scored = policy.score not in SCORES and "places" in find_scorer(policy.score).reads
    apart = policy.replays or scored or policy.decay or policy.granule is not None or policy.sample > 0
    window = bool(policy.protect.recent or policy.protect.sinks)
    shared = policy.allocate.heads != "uniform" or policy.allocate.layers in SHARES
    gone = policy.protect.tokens and window
    return apart or gone or (shared and isinstance(policy.protect.recent, float) and window)


def _weight(policy: Spec) -> Weight:
    if policy.weight is None:
        return Weight()
    return Weight(policy.weight.by, policy.weight.floor, *_share(policy.weight.after))


def _protected(policy: Spec) -> Protected:
    sinks, recent = policy.protect.sinks + policy.evicted.slots, policy.protect.recent
    return Protected(sinks, recent) if isinstance(recent, int) else Protected(sinks, 0, *_share(recent))


def _budget(policy: Spec, entry: Entry) -> tuple[Record, ...]:
    if not isinstance(policy.budget, float):
        return (Budget(int(policy.budget or 0)),)
    if policy.unit == "tokens":
        return (Budget(0, *_share(policy.budget), policy.min_slots),)
    exits = _merge(policy), _refit(policy)
    holding = Rule(Statistics(tuple(_kept(policy))), Ragged(_ragged(policy)), *exits, _storage(policy, entry))
    found = in_bytes(fraction(policy.budget), policy.min_slots, holding, entry)
    if found is None:
        raise PolicyError(
            f"policy {policy.name!r}: the codes of all tokens hold more than {policy.asked}",
            hint=f"ask for more than {100 * least_share(holding, entry):.3g}%, or demote to fewer bits, larger groups",
        )
    return found


def _ragged(policy: Spec) -> bool:
    """Whether heads have budgets of their own."""
    return policy.replays or policy.allocate.heads != "uniform" or policy.allocate.layers in SHARES


def _storage(policy: Spec, entry: Entry) -> Storage:
    to = policy.evicted.to
    if to is None:
        return _stored(policy, policy.store.k, policy.store.v, entry)
    return replace(_stored(policy, to.k, to.v, entry), residual=0, whole_sinks=0, by_score=True)


def _stored(policy: Spec, k: str, v: str, entry: Entry) -> Storage:
    held = policy.store
    group = held.group if isinstance(held.group, int) else max(1, int(held.group * entry.d))
    turns = held.rotate == "hadamard"
    storage = Storage(k, v, group, turns, held.residual, held.sinks, **_fits(policy))
    return storage if storage.coded else Storage()


def _fits(policy: Spec) -> dict[str, Any]:
    """The words of `Storage` that say how vectors are fitted."""
    held = policy.store
    found: dict[str, Any] = {"k_fit": held.fit_k, "v_fit": held.fit_v}
    if held.fit_k == "channels":
        found["kept_num"], found["kept_den"] = _share(held.channels)
    if "atoms" in (held.fit_k, held.fit_v):
        found["atoms"] = held.atoms
    return found


def _layer(policy: Spec, layer: int, layers: int) -> Layer:
    """Only where something depends on it: alike layers share what is compiled for them."""
    allocate = policy.allocate
    read = policy.score not in SCORES and "layer" in find_scorer(policy.score).reads
    by_chance = policy.sample > 0 or (policy.evicted.merge is not None and policy.evicted.merge.gate == "chance")
    placed = read or by_chance or allocate.layers == "pyramid" or allocate.heads == "table"
    return Layer(layer if placed else 0, layers if allocate.layers != "uniform" else 1)


def _heads(policy: Spec) -> Heads:
    allocate = policy.allocate
    safe = _share(allocate.safeguard) if "flat" in (allocate.heads, allocate.layers) else (0, 1)
    return Heads(quote(allocate.file) if allocate.heads == "table" else "", *safe)


def _share(value: Any) -> tuple[int, int]:
    """A fraction as a ratio of integers."""
    exact = fraction(value)
    return exact.numerator, exact.denominator
