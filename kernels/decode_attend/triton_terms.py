"""What a rule's records say, in the constants of decode_attend's kernels; and which rules those are."""

from __future__ import annotations

from typing import Any

from kvpass.kernels.attention.observation import Observation, emitted
from kvpass.kernels.budget import Budget
from kvpass.kernels.codecs.storage import Storage
from kvpass.kernels.exits.record import Merge
from kvpass.kernels.rank.criterion import INF, SCORED, Ranking, Scope
from kvpass.kernels.rank.layer import Layer
from kvpass.kernels.rank.marks import MARK, Marks
from kvpass.kernels.rank.places import NUMBER, Protected
from kvpass.kernels.rank.pyramid import Pyramid
from kvpass.kernels.rank.scored import Scoring
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rank.weights import WEIGHT, Weight
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.ragged import Ragged, columns
from kvpass.kernels.slots.state import fields_of
from kvpass.kernels.slots.statistics import Statistics, stat

from .triton_stored import readable

RECORDS = {
    *("Statistics", "Observation", "Ranking", "Scoring", "Weight", "Scope", "Protected", "Budget", "Layer", "Pyramid"),
    *("Ragged", "ShareOut", "Marks", "Timing", "Storage"),
    *("Pool", "Granule", "Sample", "Heads", "Fair", "Reindex", "Replay"),  # of calls of several tokens, or after
}
"""Names of the records that a step reads here, or that no step reads."""

_SCORES = {"position": 0, "sum": 1, "mean": 2, "important": 3, "last": 4, SCORED: 5}


def understood(rule: Rule) -> bool:
    """Whether the kernels take steps under a rule: all but rings, slots that are merged, codes that nobody named
    (`readable`), other fields of a state that not all have, and records that nobody named here.
    """
    found: bool | None = rule.derived.get(understood)
    if found is None:
        named = {type(one).__name__ for one in rule if one is not rule[Merge]} <= RECORDS
        named = named and not rule[Merge].steps
        alike = not (rule[Ragged].ragged and rule[Ranking].together)
        known = readable(rule[Storage]) and fields_of(rule) == fields_of(Rule(rule[Storage]))
        found = rule.derived[understood] = named and alike and known
    return found


def observes(rule: Rule) -> bool:
    """Whether a step's query changes statistics."""
    return bool(emitted(rule)) and rule[Observation].decode != "none"


def numbers(rule: Rule) -> dict[str, int]:
    """Arguments: what differs between layers and budgets, for which no kernel is compiled anew."""
    budget = rule[Budget]
    return {
        "slots": budget.slots, "num": budget.num, "den": budget.den, "floor": budget.floor, "layer": rule[Layer].layer
    }  # fmt: skip


def constants(rule: Rule) -> dict[str, Any]:
    """Constants of `end_step`, by name."""
    protected, scope, weight, pyramid = rule[Protected], rule[Scope], rule[Weight], rule[Pyramid]
    top = (weight.top_num, weight.top_den) if weight.top_num else (scope.scope_num, scope.scope_den)
    score = rule[Ranking].score
    by = "sum" if score == "mean" else score
    share_out = rule[ShareOut]
    return {
        **{name.upper(): stat(rule, name) for name in ("sum", "sumsq", "count")},
        "COLUMNS": columns(rule),
        "CUT": share_out.cut if share_out.cut > -INF else float("-inf"),
        "SINKS_KEPT": protected.sinks,
        "RECENT": protected.recent,
        "RECENT_NUM": protected.recent_num,
        "RECENT_DEN": protected.recent_den,
        "HALVED": share_out.share == "threshold",
        "OBSERVED": rule[Observation].window,
        "BETA": pyramid.beta,
        "LAYERS": rule[Layer].layers,
        "TOP": 0 if not top[0] or not rule.evicts else 2 if weight.top_num else 1,
        "TOP_NUM": top[0],
        "TOP_DEN": top[1],
        "SCORE": _SCORES[score],
        "BY": -1 if score == "position" else stat(rule, by),
        "NUMBER": stat(rule, NUMBER),
        "MARK": stat(rule, MARK) if rule[Marks].marked else -1,
        "WEIGHT": stat(rule, WEIGHT),
        "WEIGHT_FLOOR": float(weight.weight_floor),
        "DECAY": rule[Scoring].decay,
    }  # fmt: skip


def observed(rule: Rule) -> dict[str, Any]:
    """Constants of what `ending_kernel` does to statistics."""
    observation = rule[Observation]
    return {
        "LOGITS": observes(rule),
        "ADD": observation.decode == "add",
        "MEAN": observation.group == "mean",
        "IMPORTANT": stat(rule, "important"),
        "LAST": stat(rule, "last"),
    }


def counted(rule: Rule) -> bool:
    """Whether a step must know how many slots its query sees."""
    return observes(rule) and bool({"important", "last"} & set(rule[Statistics].stats))
