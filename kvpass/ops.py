"""torch.library registration of the kernels: schemas, what they mutate, fakes. Kernels are imported on first call.

The schemas are docs/design/0001-state-and-kernels.md in torch's notation; `(a!)` marks the state that an op changes
in place. Importing this
module registers the ops once per process; it imports neither kernels nor triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "kvpass"

SCHEMAS = {
    "prefill_attend": "(Tensor q, Tensor k, Tensor v, Tensor? pos, Tensor? mask, float scale, str sees, str rule, "
    "Tensor? sinks=None, float softcap=0.0, Tensor? tokens=None, Tensor? bounds=None, SymInt position=0, "
    "Tensor? memory_k=None, Tensor? memory_v=None, Tensor? bias=None) -> (Tensor, Tensor, Tensor)",
    "join_slots": "(Tensor[] state, Tensor k_new, Tensor v_new, SymInt position, str rule) -> Tensor[]",
    "score_slots": "(Tensor stats, Tensor? past_stats, Tensor? pos, Tensor valid, Tensor cursor, SymInt position, "
    "str rule, str sees='', Tensor? mask=None, Tensor? bounds=None, "
    "Tensor? k=None, Tensor? v=None, Tensor? rows=None, Tensor? wo=None, "
    "Tensor? hidden=None, Tensor? marks=None, Tensor? queries=None, Tensor? turns=None, Tensor? whole=None, "
    "Tensor? replayed=None) "
    "-> (Tensor, Tensor, Tensor)",
    "select_slots": "(Tensor score, Tensor cursor, SymInt capacity) -> Tensor",
    "compact_slots": "(Tensor?[] keys, Tensor idx, Tensor cursor_new, Tensor(a!)[] state, str rule) -> ()",
    "merge_slots": "(Tensor k, Tensor v, Tensor score, Tensor stats, Tensor idx, Tensor(a!)[] state, str rule) -> ()",
    "refit_slots": "(Tensor q, Tensor k, Tensor v, Tensor? pos, Tensor? mask, Tensor valid, float scale, str sees, "
    "Tensor score, Tensor idx, Tensor(a!)[] state, str rule, float softcap=0.0, Tensor? tokens=None, "
    "SymInt position=0, Tensor? bias=None) -> ()",
    "decode_attend": "(Tensor q, Tensor k_new, Tensor v_new, Tensor? mask, Tensor(a!)[] state, SymInt position, "
    "float scale, str rule, Tensor? sinks=None, float softcap=0.0, int latent=0, Tensor? arrive=None, str sees='', "
    "Tensor? tokens=None, Tensor? bounds=None, Tensor? at=None, Tensor? memory_k=None, Tensor? memory_v=None) "
    "-> Tensor",
    "token_bounds": "(Tensor tokens, SymInt position, SymInt queries, Tensor? at=None) -> Tensor",
    "mask_spans": "(Tensor mask) -> Tensor",
    "written": "(Tensor mask, SymInt end, Tensor? at=None, bool check=True) -> Tensor",
    "window_rows": "(Tensor q, Tensor k, Tensor? pos, Tensor? mask, Tensor valid, float scale, str sees, str rule, "
    "Tensor? sinks=None, float softcap=0.0, Tensor? tokens=None, SymInt position=0, "
    "Tensor? memory_k=None, Tensor? memory_v=None, Tensor? bias=None) -> Tensor",
    "replay_scores": "(Tensor q, Tensor k, Tensor v, Tensor pos, Tensor? mask, Tensor valid, Tensor stats, "
    "Tensor cursor, Tensor repeated, float scale, str sees, str rule, Tensor? sinks=None, float softcap=0.0, "
    "Tensor? tokens=None, SymInt position=0, Tensor? memory_k=None, Tensor? memory_v=None, Tensor? bias=None, "
    "Tensor? wo=None, Tensor? hidden=None) -> Tensor",
    "encode_slots": "(Tensor k, Tensor v, str rule) -> Tensor[]",
    "fit_slots": "(Tensor q, Tensor k, Tensor v, Tensor valid, Tensor cursor, Tensor(a!)[] fits, str rule) -> ()",
    "encode_fitted": "(Tensor k, Tensor v, Tensor[] fits, Tensor[] past, str rule) -> Tensor[]",
    "keep_whole": "(Tensor k, Tensor v, Tensor valid, SymInt position, Tensor(a!)[] state, str rule) -> ()",
    "choose_whole": "(Tensor k, Tensor v, Tensor? pos, Tensor score, Tensor(a!)[] state, str rule) -> ()",
    "arrivals": "(Tensor k_new, Tensor v_new, Tensor cursor, SymInt position, str rule, Tensor? wo=None, "
    "Tensor? hidden=None, Tensor? marks=None) -> Tensor",
}

HOMES = {
    "token_bounds": "attention.visibility",
    "mask_spans": "attention.visibility",
    "written": "attention.masks",
    "merge_slots": "exits.merge_slots",
    "refit_slots": "exits.refit_slots",
    "encode_slots": "codecs.ops",
    "fit_slots": "codecs.ops",
    "encode_fitted": "codecs.ops",
    "keep_whole": "codecs.ops",
    "window_rows": "rank.window_rows",
    "replay_scores": "rank.replay",
    "score_slots": "rank.scores",
    "arrivals": "rank.scored",
}
"""Modules of kvpass.kernels whose name is not the op's."""


def _deferred(name: str) -> Callable[..., Any]:
    """The op's body: imports its kernel on the first call and is then one extra Python call."""
    body: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal body
        if body is None:
            body = getattr(import_module(f"kvpass.kernels.{HOMES.get(name, name)}"), name)
        return body(*args)

    return call


def _rule(rule: str) -> Any:
    from kvpass.kernels.rule import Rule

    return Rule.parse(rule)


def _statistics(rule: str) -> int:
    """How many statistics slots keep."""
    from kvpass.kernels.slots.statistics import Statistics

    return len(_rule(rule)[Statistics].stats)


def _fake_prefill_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    mask: Tensor | None,
    scale: float,
    sees: str,
    rule: str,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    from kvpass.kernels.attention.observation import emitted

    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    stats = q.new_empty(len(emitted(_rule(rule))), k.shape[0], k.shape[1], k.shape[2], dtype=torch.float32)
    return out, stats, q.new_empty(q.shape[0], q.shape[2], dtype=torch.bool)


def _fake_join_slots(state: Sequence[Tensor], k_new: Tensor, v_new: Tensor, position: int, rule: str) -> list[Tensor]:
    from kvpass.kernels.slots.ragged import is_ragged
    from kvpass.kernels.slots.state import State

    held = State.of(state, _rule(rule))
    length = (position if is_ragged(held.cursor) else held.slots) + k_new.shape[2]
    return [new.new_empty(*new.shape[:2], length, new.shape[3]) for new in (k_new, v_new)] + [
        tensor.new_empty([length if letter == "C" else n for letter, n in zip(field.dims, tensor.shape, strict=True)])
        for field, tensor in held.per_slot()
        if field.name not in ("k", "v")
    ]


def _fake_encode_slots(k: Tensor, v: Tensor, rule: str) -> list[Tensor]:
    from kvpass.kernels.codecs.storage import Storage, coded

    storage = _rule(rule)[Storage]
    return [
        x.new_empty(*x.shape[:-1], part.size, dtype=part.dtype)
        for half, x in (("k", k), ("v", v))
        if half in coded(_rule(rule))
        for part in storage.codec_of(half).parts(storage.held_width(half, x.shape[-1]), storage.scale_group)
    ]


def _fake_encode_fitted(k: Tensor, v: Tensor, fits: Any, past: Sequence[Tensor], rule: str) -> list[Tensor]:
    return [old.new_empty(old.shape) for old in past] or _fake_encode_slots(k, v, rule)


def _fake_score_slots(
    stats: Tensor,
    past_stats: Tensor | None,
    pos: Tensor | None,
    valid: Tensor,
    cursor: Tensor,
    position: int,
    rule: str,
    *rest: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = stats.new_empty(_statistics(rule), *stats.shape[1:])
    return stats.new_empty(stats.shape[1:]), kept, cursor.new_empty(cursor.shape)


def _fake_select_slots(score: Tensor, cursor: Tensor, capacity: int) -> Tensor:
    return score.new_empty(score.shape[0], score.shape[1], capacity, dtype=torch.int32)


def _fake_changes_state(*args: Any) -> None:
    return None


def _fake_decode_attend(q: Tensor, k_new: Tensor, v_new: Tensor, *rest: Any) -> Tensor:
    latent = rest[7] if len(rest) > 7 else 0
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], latent or v_new.shape[3])


def _fake_window_rows(
    q: Tensor,
    k: Tensor,
    pos: Tensor | None,
    mask: Tensor | None,
    valid: Tensor,
    scale: float,
    sees: str,
    rule: str,
    *rest: Any,
) -> Tensor:
    from kvpass.kernels.attention.observation import Observation

    rows = torch.sym_min(_rule(rule)[Observation].queries, valid.shape[1])
    group = q.shape[1] // k.shape[1]
    return q.new_empty(k.shape[0], k.shape[1], group, rows, k.shape[2], dtype=torch.float32)


def _fake_replay_scores(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, *rest: Any) -> Tensor:
    return pos.new_empty(pos.shape, dtype=torch.float32)


def _fake_arrivals(
    k_new: Tensor, v_new: Tensor, cursor: Tensor, position: int, rule: str, *rest: Tensor | None
) -> Tensor:
    return k_new.new_empty(_statistics(rule), *cursor.shape[:2], dtype=torch.float32)


def _fake_token_bounds(tokens: Tensor, position: int, queries: int, at: Tensor | None = None) -> Tensor:
    return tokens.new_empty(tokens.shape[0], 4, dtype=torch.int32)


def _fake_mask_spans(mask: Tensor) -> Tensor:
    return mask.new_empty(mask.shape[0], 4, dtype=torch.int32)


def _fake_written(mask: Tensor, end: int, at: Tensor | None = None, check: bool = True) -> Tensor:
    return mask.new_empty(mask.shape) if at is not None else mask.new_empty(*mask.shape[:-1], end)


FAKES: dict[str, Callable[..., Any]] = {
    "prefill_attend": _fake_prefill_attend,
    "join_slots": _fake_join_slots,
    "score_slots": _fake_score_slots,
    "select_slots": _fake_select_slots,
    "compact_slots": _fake_changes_state,
    "merge_slots": _fake_changes_state,
    "refit_slots": _fake_changes_state,
    "encode_slots": _fake_encode_slots,
    "fit_slots": _fake_changes_state,
    "encode_fitted": _fake_encode_fitted,
    "keep_whole": _fake_changes_state,
    "choose_whole": _fake_changes_state,
    "decode_attend": _fake_decode_attend,
    "token_bounds": _fake_token_bounds,
    "mask_spans": _fake_mask_spans,
    "written": _fake_written,
    "window_rows": _fake_window_rows,
    "replay_scores": _fake_replay_scores,
    "arrivals": _fake_arrivals,
}


def _register() -> torch.library.Library | None:
    """Define and implement the ops; None if this process already has them (a reload, a second import path)."""
    if hasattr(torch.ops.kvpass, next(iter(SCHEMAS))):
        return None
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, _deferred(name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", FAKES[name], lib=library)
    return library


_library = _register()

decode_attend = torch.ops.kvpass.decode_attend.default
prefill_attend = torch.ops.kvpass.prefill_attend.default
join_slots = torch.ops.kvpass.join_slots.default
score_slots = torch.ops.kvpass.score_slots.default
select_slots = torch.ops.kvpass.select_slots.default
compact_slots = torch.ops.kvpass.compact_slots.default
