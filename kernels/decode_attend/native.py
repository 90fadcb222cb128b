"""decode_attend on CPUs in one pass of C++ (`kvpass.kernels.native`): append, attention, statistics and the victim.

What it does not know it leaves alone, and the reference runs: whole rules (`_understood`), or single steps: masks,
padding, a cache without room, tensors that do not fit. Called once per layer and token, so it counts Python's calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, addressof, c_char_p, c_float, c_int32, c_void_p
from struct import Struct
from typing import Any

import torch
from kvpass.kernels.attention.observation import EVEN, Observation, emitted
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.attention.visibility import Sees
from kvpass.kernels.budget import Apart, Budget, budget
from kvpass.kernels.decode_attend.step import step_facts
from kvpass.kernels.decode_attend.victim import evict_one
from kvpass.kernels.native.library import KINDS, function
from kvpass.kernels.rank.allocate import Heads
from kvpass.kernels.rank.criterion import SCORED, Ranking
from kvpass.kernels.rank.layer import Layer
from kvpass.kernels.rank.marks import KEEP, MARK, Marks
from kvpass.kernels.rank.places import NUMBER, Protected
from kvpass.kernels.rank.pyramid import Pyramid
from kvpass.kernels.rank.replay import Replay
from kvpass.kernels.rank.scored import UNSCORED, Sample, Scoring
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rank.smooth import Fair, Granule, Pool
from kvpass.kernels.rank.weights import WEIGHT, Weight
from kvpass.kernels.rule import Record, Rule
from kvpass.kernels.slots.cursor import SEEN
from kvpass.kernels.slots.ragged import Ragged, columns
from kvpass.kernels.slots.state import FIELDS, State, fields_of
from kvpass.kernels.slots.statistics import Statistics, stat
from kvpass.kernels.timing import Timing
from torch import Tensor

WIDEST, MOST = 512, 16
"""Entries of a head, and query heads per KV head, that the C++ is compiled for."""

PICKED = (
    Statistics, Observation, Pool, Granule, Fair, Ranking, Protected, Budget, Apart, Layer, Pyramid, Ragged, Heads,
    Scoring, Sample, Replay, Timing, Weight, Marks, ShareOut,
)  # fmt: skip
"""Records whose victims the C++ finds, or that a step does not read; with any other, and what `_picks` excepts, torch
ends the step.
"""


class Words(Structure):
    """`struct Rule` of step.h."""

    _fields_ = (
        *((name, c_int32) for name in (
            "sum", "sumsq", "count", "important", "last", "statistics", "observes", "replaces", "mean", "ragged",
            "picks", "by", "row", "per", "weight", "mark", "number", "decay", "scored", "sinks", "recent",
            "recent_num", "recent_den", "slots", "num", "den", "floor",
        )),
        *((name, c_float) for name in ("weight_floor", "even", "factor", "softcap", "unscored", "keep")),
    )  # fmt: skip


ARGUMENTS = Struct("13P14q")
"""`struct Call` of step.h."""

MANY = 4096
"""Lanes that are kept: one for each rule, shape and capacity."""

_lanes: dict[Any, Lane | None] = {}


class Lane:
    """What is known of steps under one rule in one shape before a token comes.

    Args:
        step: the C++.
        words: what it reads of the rule.
    """

    def __init__(self, step: Any, rule: Rule, words: Words, sees: Sees, heads: int, state: State) -> None:
        self.step, self.rule, self.words, self.sees = step, rule, words, sees
        self.at, self.picks = addressof(words), bool(words.picks)
        (self.batch, self.heads, self.places, _), wide = state.k.shape, state.v.shape[3]
        self.out = self.batch, heads, 1, wide
        self.arrivals = len(state.stats), self.batch, self.heads

    def size(self, cursor: Tensor) -> int:
        """The budget where it is no formula that the C++ knows, -1 where it is. Of the first row: with others that
        have seen more or less tokens the C++ declines.
        """
        if self.words.den:
            return -1
        seen = c_int32.from_address(cursor.data_ptr() + 4 * SEEN).value
        return int(budget(self.rule, seen + 1))


def decode_attend_native(
    q: Tensor, k: Tensor, v: Tensor, state: Sequence[Tensor], position: int, rule: str, softmax: Softmax,
    arrive: Tensor | None, sees: str, tokens: Tensor | None, bounds: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """See `kvpass.kernels.decode_attend.decode_attend`. None: this is not for it, and nothing has changed."""
    shapes = tuple([(x.shape, x.dtype) for x in state])
    key = rule, sees, softmax.factor, softmax.softcap, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, shapes
    try:
        lane = _lanes[key]
    except KeyError:
        lane = _lanes[key] = _lane(q, k, v, state, rule, softmax, sees)
        if len(_lanes) > MANY:
            _lanes.clear()
    if lane is None or not all(x.is_contiguous() for x in state):
        return None
    s_q, s_k, s_v = q.stride(), k.stride(), v.stride()
    if not s_q[3] == s_k[3] == s_v[3] == 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        s_q, s_k, s_v = q.stride(), k.stride(), v.stride()
    keys, values, pos, stats, cursor = state
    width, low, sinks = 0, lane.sees.lowest(position), softmax.sinks
    if tokens is not None:
        if bounds is None or tokens.shape[1] <= position or {len(tokens), len(bounds)} - {1, lane.batch}:
            return None
        tokens = tokens.expand(lane.batch, -1).contiguous()
        bounds, width = bounds.expand(lane.batch, -1).int().contiguous(), tokens.shape[1]
    if sinks is not None:
        if tuple(sinks.shape) != lane.out[1:2]:
            return None
        sinks = sinks.float().contiguous()
    if arrive is not None:
        if tuple(arrive.shape) != lane.arrivals or arrive.dtype != torch.float32:
            return None
        arrive = arrive.contiguous()
    facts = None
    if not lane.picks:
        facts = step_facts(cursor.view(-1, cursor.shape[2]).tolist(), State(state), position, lane.rule)
    out = torch.empty(lane.out, dtype=torch.float32)
    given = ARGUMENTS.pack(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), keys.data_ptr(), values.data_ptr(), pos.data_ptr(),
        cursor.data_ptr(), stats.data_ptr(), out.data_ptr(), _at(arrive), _at(sinks), _at(tokens), _at(bounds),
        s_q[0], s_q[1], s_k[0], s_k[1], s_v[0], s_v[1], lane.batch, lane.heads, lane.places, position, low, width,
        lane.size(cursor), torch.get_num_threads(),
    )  # fmt: skip
    if lane.step(lane.at, given):
        return None
    if facts is not None:
        evict_one(State(state), facts, lane.rule)
    return out if q.dtype == torch.float32 else out.to(q.dtype)


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _lane(
    q: Tensor, k: Tensor, v: Tensor, state: Sequence[Tensor], text: str, softmax: Softmax, sees: str
) -> Lane | None:
    """What is known of such steps; None where the C++ is not for them."""
    rule = Rule.parse(text).of_steps
    known = softmax.softcap >= 0 and _understood(rule) and len(state) == len(FIELDS)
    if not known or not _fit(q, k, v, State(state), rule):
        return None
    step = function("step", GROUP=q.shape[1] // k.shape[1], DIM=k.shape[3], WIDE=v.shape[3], KIND=KINDS[q.dtype])
    if step is None:
        return None
    step.argtypes, step.restype = [c_void_p, c_char_p], ctypes.c_int
    return Lane(step, rule, _said(rule, softmax), Sees.parse(sees), q.shape[1], State(state))


def _fit(q: Tensor, k: Tensor, v: Tensor, held: State, rule: Rule) -> bool:
    """Whether tensors are as they must be: what they are not, the reference says."""
    batch, heads, slots = held.pos.shape
    dim, wide = k.shape[3], v.shape[3]
    sizes = {"B": batch, "H": heads, "C": slots, "D": dim, "V": wide}
    sizes |= {"N": len(rule[Statistics].stats), "X": columns(rule)}
    dtypes = {"k": q.dtype, "v": q.dtype, "pos": torch.int32, "stats": torch.float32, "cursor": torch.int32}
    for field in FIELDS:
        tensor = held[field.name]
        if list(tensor.shape) != [sizes[letter] for letter in field.dims] or tensor.dtype != dtypes[field.name]:
            return False
    one = (batch, heads, 1)
    new = tuple(k.shape[:3]) == one and tuple(v.shape[:3]) == one and k.dtype == v.dtype == q.dtype
    asked = q.dim() == 4 and q.shape[0] == batch and q.shape[1] % heads == 0 and tuple(q.shape[2:]) == (1, dim)
    return new and asked and q.dtype in KINDS and max(dim, wide) <= WIDEST and 0 < q.shape[1] // heads <= MOST


def _understood(rule: Rule) -> bool:
    found: bool | None = rule.derived.get(_understood)
    if found is None:
        observed = emitted(rule) if rule[Observation].decode != "none" else ()
        kept = all(stat(rule, name) >= 0 for name in observed)
        found = rule.derived[_understood] = fields_of(rule) == FIELDS and not rule.demotes and kept
    return found


def _picks(rule: Rule) -> bool:
    """Whether the C++ finds the victim."""
    by, share = rule[Ranking], rule[ShareOut]
    alone = not by.together and not rule[Weight].top_num and share.cut == ShareOut.cut and share.share != "threshold"
    return rule.only(*PICKED) and alone


def _said(rule: Rule, softmax: Softmax) -> Words:
    watch, by, kept = rule[Observation], rule[Ranking].score, rule[Protected]
    observes = watch.decode != "none" and bool(emitted(rule))
    rows = {name: stat(rule, name) if observes and name in emitted(rule) else -1
            for name in ("sum", "sumsq", "count", "important", "last")}  # fmt: skip
    how = {"position": 0, "mean": 2, "important": 2, "last": 3}.get(by, 1)
    row = {"position": -1, "mean": stat(rule, "sum")}.get(by, stat(rule, by))
    formula = all(type(one).resized is Record.resized for one in rule)
    size = rule[Budget]
    return Words(
        **rows, statistics=len(rule[Statistics].stats), observes=observes, replaces=watch.decode == "replace",
        mean=watch.group == "mean", ragged=rule[Ragged].ragged, picks=_picks(rule), by=how, row=row,
        per=stat(rule, "count") if how == 2 else -1, weight=stat(rule, WEIGHT),
        mark=stat(rule, MARK) if rule[Marks].marked else -1, number=stat(rule, NUMBER),
        decay=rule[Scoring].decay and how == 1, scored=stat(rule, SCORED) >= 0, sinks=kept.sinks, recent=kept.recent,
        recent_num=kept.recent_num, recent_den=kept.recent_den, slots=size.slots, num=size.num,
        den=size.den if formula else 0, floor=size.floor, weight_floor=rule[Weight].weight_floor, even=EVEN,
        factor=softmax.factor, softcap=softmax.softcap, unscored=UNSCORED, keep=KEEP,
    )  # fmt: skip
