"""A rule in sentences: what a head may hold, what stays, what becomes of the rest. For people who did not write it."""

from __future__ import annotations

from collections.abc import Iterator

from kvpass.kernels.after_call.reindex import Reindex
from kvpass.kernels.budget import Budget
from kvpass.kernels.codecs.storage import Storage
from kvpass.kernels.exits.record import Merge
from kvpass.kernels.exits.refit import Refit
from kvpass.kernels.rank.allocate import Heads
from kvpass.kernels.rank.criterion import SCORED, Ranking, Scope
from kvpass.kernels.rank.marks import Marks
from kvpass.kernels.rank.places import Protected
from kvpass.kernels.rank.pyramid import Pyramid
from kvpass.kernels.rank.replay import Replay
from kvpass.kernels.rank.rings import Rings
from kvpass.kernels.rank.scored import Scoring
from kvpass.kernels.rank.scorers.registry import find_scorer
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rank.smooth import Granule, Pool
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.ragged import Ragged
from kvpass.kernels.timing import Timing
from kvpass.plan.listing import reads_of

ORDERS = {
    "position": "the newest stay",
    "sum": "those stay that got the most attention in all",
    "mean": "those stay that got the most attention on average, over the queries that could see them",
    "important": "those stay that got much attention most often",
    "last": "those stay that the last query attended to most",
}
"""By `Ranking.score`."""

SHARES = {
    "model": "The heads of all layers share the slots of these budgets: what scores highest stays, wherever it is.",
    "preference": "Layers share the slots of these budgets, by what their scorer prefers.",
    "threshold": "A head keeps what scores above a threshold, and the budget is a bound.",
    "heads": "The heads of a layer share the slots of its budgets: what scores highest stays.",
}
"""By `ShareOut.share`."""

MOMENTS = {
    "calls": "Slots go in calls of several tokens, never in steps of one.",
    "first": "Slots go in the first call only.",
}
"""By `Timing.when`."""


INTO = {
    "nearest_key": "the slot with the nearest key",
    "nearest_position": "the slot with the nearest position",
    "next": "the slots behind it",
    "run": "the best slot of its run of alike keys",
    "one_slot": "one slot of each head",
}
"""By `Merge.merge_into`."""


def in_words(rule: Rule) -> list[str]:
    """Sentences for people."""
    if not rule.evicts:
        return ["Nothing is evicted.", *_storage(rule)]
    protected = list(_protected(rule))
    order = _order(rule, "Of the others" if protected else "Of all")
    return [*_budget(rule), *protected, *order, *_timing(rule), *_exits(rule), *_storage(rule)]


def _budget(rule: Rule) -> Iterator[str]:
    budget, share = rule[Budget], rule[ShareOut].share
    what = "holds whole" if rule.demotes else "holds"
    if budget.slots:
        yield f"Each KV head {what} at most {budget.slots:,} tokens{_on_average(rule)}."
    elif budget.num < budget.den:
        part = f"{100 * budget.num / budget.den:.3g} % of the tokens that it has seen, and {budget.floor} in any case"
        yield f"Each KV head {what} at most {part}{_on_average(rule)}."
    if rule[Pyramid].beta:
        yield "Budgets fall from the first layer to the last."
    if share in SHARES:
        yield SHARES[share]
    elif rule[Heads].table:
        yield "The heads of a layer share its slots by a table of heads."
    elif rule[Ragged].ragged and not share:
        yield SHARES["heads"]


def _on_average(rule: Rule) -> str:
    return ", on average over the heads that share" if rule[Ragged].ragged else ""


def _order(rule: Rule, among: str) -> Iterator[str]:
    score, reads = rule[Ranking].score, ", ".join(reads_of(rule))
    if rule[Rings].rings:
        yield f"Old tokens thin out: {rule[Rings].rings} rings of slots, each sparser than the one before."
    elif score == SCORED:
        scorer = find_scorer(rule[Scoring].scorer)
        about = scorer.about.split(". ")[0].rstrip(".")
        yield f"{among} those stay that score highest; the score {scorer.name!r} (of {reads}): {about}."
    else:
        known = f" (of {reads})" if score != "position" else ""
        yield f"{among} {ORDERS[score]}{known}."
    if rule[Pool].pool != "none":
        yield f"Scores are smoothed over {rule[Pool].pool_size} neighbours ({rule[Pool].pool})."
    if rule[Granule].granule > 1:
        yield f"Runs of {rule[Granule].granule} tokens stay or go together."
    if rule[Ranking].together:
        yield "All heads of a layer keep the same tokens, by their mean score."


def _protected(rule: Rule) -> Iterator[str]:
    kept, scope = rule[Protected], rule[Scope]
    parts = [f"the first {kept.sinks} tokens"] if kept.sinks else []
    parts += [f"the newest {kept.recent}"] if kept.recent else []
    if kept.recent_num:
        parts.append(f"the newest, up to {100 * kept.recent_num / kept.recent_den:.3g} % of the budget")
    parts += ["tokens that the caller marked to stay"] if rule[Marks].marked else []
    parts += ["the most uncertain ones"] if scope.scope_num else []
    if parts:
        yield f"Protected: {', '.join(parts)}."


def _timing(rule: Rule) -> Iterator[str]:
    timing = rule[Timing]
    if timing.when in MOMENTS:
        yield MOMENTS[timing.when]
    elif timing.every > 1:
        yield f"In steps of one token, slots go every {timing.every} steps."
    if rule[Replay].replay:
        yield "Slots go after the prompt has been read once more, by what it looks at then."


def _exits(rule: Rule) -> Iterator[str]:
    merge = rule[Merge]
    if merge.merge_into:
        halves = "keys and values" if merge.merge_halves == "both" else "values"
        yield f"What goes is merged ({halves}) into {INTO[merge.merge_into]}."
    if rule[Refit].refit_queries:
        yield "Slots that stay are fitted to stand for those that go."
    if rule[Reindex].reindex:
        yield "Keys that stay are turned as if they stood next to each other."


def _storage(rule: Rule) -> Iterator[str]:
    storage = rule[Storage]
    if not storage.coded:
        return
    names = {"k": "keys", "v": "values"}
    kinds = [f"{storage.codec_of(half).name} {names[half]}" for half in storage.coded]
    yield f"Slots hold codes: {' and '.join(kinds)}."
    if rule.demotes:
        yield "What the budget has no room for stays, as codes alone."
    elif storage.whole:
        first = f"first {storage.whole_sinks}" if storage.whole_sinks else ""
        newest = f"newest {storage.residual}" if storage.residual else ""
        yield f"The {' and '.join(filter(None, (first, newest)))} tokens are held whole too."
