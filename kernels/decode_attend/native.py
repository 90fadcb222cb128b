"""decode_attend on CPUs in one pass of C++ (`kvpass.kernels.native`): append, attention, statistics and the victim.

What it does not know it leaves alone, and the reference runs: whole rules (`supports`), or single steps: padding, a
cache without room.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from kvpass.kernels.attention.observation import EVEN, Observation, emitted
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.budget import Apart, Budget, budget
from kvpass.kernels.decode_attend.call import Call, Token
from kvpass.kernels.decode_attend.reference import decode_attend_reference
from kvpass.kernels.decode_attend.step import step_facts
from kvpass.kernels.decode_attend.victim import evict_one
from kvpass.kernels.native.library import function
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
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import SEEN
from kvpass.kernels.slots.ragged import Ragged, columns
from kvpass.kernels.slots.state import FIELDS, State, fields_of
from kvpass.kernels.slots.statistics import Statistics, stat
from kvpass.kernels.timing import Timing

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

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
            "evicts", "picks", "by", "row", "per", "weight", "mark", "number", "decay", "scored", "sinks", "recent",
            "recent_num", "recent_den", "slots", "num", "den", "floor",
        )),
        *((name, c_float) for name in ("weight_floor", "even", "factor", "softcap", "unscored", "keep")),
    )  # fmt: skip


class Arguments(Structure):
    """`struct Call` of step.h."""

    _fields_ = (
        *((name, c_void_p) for name in (
            "q", "k_new", "v_new", "k", "v", "pos", "cursor", "stats", "out", "arrive", "sinks", "tokens", "bounds",
        )),
        *((name, c_int64) for name in (
            "q_row", "q_head", "k_row", "k_head", "v_row", "v_head", "batch", "heads", "places", "position", "low",
            "columns", "bound_rows", "size", "threads",
        )),
    )  # fmt: skip


def supports(token: Token, state: State, call: Call) -> bool:
    """Keys and values as they are and apart, on a CPU with a compiler; all but tokens and windows in no mask."""
    dtype, k, group = token.q.dtype, token.k.shape[3], token.q.shape[1] // token.k.shape[1]
    plain = call.mask is None and not call.latent and call.softmax.beside is None and dtype in KINDS
    plain = plain and max(k, token.v.shape[3]) <= WIDEST and group <= MOST and token.q.device.type == "cpu"
    return plain and _understood(call.rule.of_steps) and _step(group, k, token.v.shape[3], dtype) is not None


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


def _step(group: int, dim: int, wide: int, dtype: torch.dtype) -> Any:
    found = function("step", GROUP=group, DIM=dim, WIDE=wide, KIND=KINDS[dtype])
    if found is not None and found.argtypes is None:
        found.argtypes, found.restype = [POINTER(Words), POINTER(Arguments)], ctypes.c_int
    return found


def decode_attend_native(token: Token, state: State, call: Call) -> torch.Tensor:
    """See `kvpass.kernels.decode_attend.decode_attend`."""
    rule = call.rule.of_steps
    q, k, v, arrive = token
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    (batch, heads, places, dim), wide, group = state.k.shape, v.shape[3], q.shape[1] // k.shape[1]
    words = _words(rule, call.softmax)
    facts = None
    if not words.picks:
        facts = step_facts(state.cursor.view(-1, columns(rule)).tolist(), state, call.position, rule)
    out = torch.empty(batch, q.shape[1], 1, wide)
    tokens, bounds, sinks = call.tokens, call.bounds, call.softmax.sinks
    tokens = tokens if tokens is None else tokens.contiguous()
    sinks = sinks if sinks is None else sinks.float().contiguous()
    bounds = bounds if bounds is None else bounds.int().contiguous()
    arrive = arrive if arrive is None else arrive.contiguous()
    size = -1 if words.den else int(budget(rule, int(state.cursor[0, 0, SEEN]) + 1))
    given = Arguments(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), state.k.data_ptr(), state.v.data_ptr(), state.pos.data_ptr(),
        state.cursor.data_ptr(), state.stats.data_ptr(), out.data_ptr(), _at(arrive), _at(sinks), _at(tokens),
        _at(bounds), q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), batch, heads,
        places, call.position, call.low, 0 if tokens is None else tokens.shape[1],
        1 if bounds is None else bounds.shape[0], size, torch.get_num_threads(),
    )  # fmt: skip
    if _step(group, dim, wide, q.dtype)(words, given):
        return decode_attend_reference(token, state, call)
    if facts is not None:
        evict_one(state, facts, rule)
    return out if q.dtype == torch.float32 else out.to(q.dtype)


def _at(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _words(rule: Rule, softmax: Softmax) -> Words:
    """The rule as C++ reads it. `den` 0: the budget is not by a formula that it knows."""
    known = rule.derived.setdefault(_words, {})
    key = softmax.factor, softmax.softcap
    if key not in known:
        known[key] = _said(rule, softmax)
    found: Words = known[key]
    return found


def _said(rule: Rule, softmax: Softmax) -> Words:
    watch, by, kept = rule[Observation], rule[Ranking].score, rule[Protected]
    observes = watch.decode != "none" and bool(emitted(rule))
    rows = {name: stat(rule, name) if observes and name in emitted(rule) else -1
            for name in ("sum", "sumsq", "count", "important", "last")}  # fmt: skip
    how = {"position": 0, "mean": 2, "important": 2, "last": 3}.get(by, 1)
    row = {"position": -1, "mean": stat(rule, "sum")}.get(by, stat(rule, by))
    formula = type(rule[Budget]) is Budget and not any(type(x).resized is not type(rule[Budget]).resized for x in rule)
    size = rule[Budget]
    return Words(
        **rows, statistics=len(rule[Statistics].stats), observes=observes, replaces=watch.decode == "replace",
        mean=watch.group == "mean", ragged=rule[Ragged].ragged, evicts=rule.drops, picks=_picks(rule), by=how, row=row,
        per=stat(rule, "count") if how == 2 else -1, weight=stat(rule, WEIGHT),
        mark=stat(rule, MARK) if rule[Marks].marked else -1, number=stat(rule, NUMBER), decay=rule[Scoring].decay and how == 1,
        scored=stat(rule, SCORED) >= 0, sinks=kept.sinks, recent=kept.recent, recent_num=kept.recent_num,
        recent_den=kept.recent_den, slots=size.slots, num=size.num, den=size.den if formula else 0, floor=size.floor,
        weight_floor=rule[Weight].weight_floor, even=EVEN, factor=softmax.factor, softcap=softmax.softcap,
        unscored=UNSCORED, keep=KEEP,
    )  # fmt: skip
