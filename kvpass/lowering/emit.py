"""The ops of one site, written in front of its core in the rewritten graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import example
from kvpass.graph.shapes import shape_of
from kvpass.kernels.codecs.storage import WHOLE_AT, Storage, coded, fit_fields
from kvpass.kernels.rank.replay import Replay
from kvpass.kernels.slots.bias import BIAS
from kvpass.kernels.slots.ragged import Ragged
from kvpass.kernels.slots.state import fields_of
from kvpass.lowering.emit_heads import from_slots, regrouped, to_slots
from kvpass.lowering.emit_masks import seen_of
from kvpass.lowering.emit_nodes import Rewriting, Writer
from kvpass.plan.site_plan import SitePlan
from kvpass.runtime.steps.buffer_position import POSITION
from kvpass.runtime.steps.caller_marks import MARKS
from kvpass.runtime.steps.repeated_tokens import REPEATED
from kvpass.sites.memory import memory_layouts
from kvpass.sites.site import Half
from kvpass.terms import CacheForm, Phase


class Emitter:
    """Writes the ops of one site in front of its core."""

    def __init__(self, low: Rewriting, planned: SitePlan, core: fx.Node, state: dict[str, fx.Node]) -> None:
        self.planned, self.site, self.rule = planned, planned.site, planned.rule.encode()
        self.write = Writer(low, self.site, core)
        self.state = state
        new = self._queries(), self._heads_first(self.site.key), self._heads_first(self.site.value)
        self.q, self.new_k, self.new_v = to_slots(self.write, *new)
        self.position = self._position()
        self.seen = seen_of(self.write, self.position)
        self.extras, self.memory = self._extras(), self._memory()

    def decode(self) -> list[fx.Node]:
        """The output of each core."""
        core = self.site.core
        args: tuple[Any, ...] = (self.q, self.new_k, self.new_v, self.seen.mask, [*self.state.values()])
        extras: tuple[Any, ...] = (*self.extras, core.latent.rank if core.latent else 0, None)
        if self.planned.arrives:
            token = self.new_k, self.new_v, self.state["cursor"], self.position, self.rule
            extras = (*extras[:-1], self.write.op("arrivals", *token, *self._read_beside()))
        extras += self.seen.words, self.seen.tokens, self.seen.bounds
        args += self.position, core.scale, self.rule
        given = _without_defaults(extras, (None, 0.0, 0, None, "", None, None))
        return self._outputs(self.write.op("decode_attend", *args, *given, **self.memory))

    def multi(self) -> list[fx.Node]:
        """Prefill or extend: the output of each core."""
        write, core = self.write, self.site.core
        keys, past = self._keys()
        k, pos = keys["k"], keys["pos"]
        values = keys["v"] if core.latent is None else write.method("narrow", k, -1, 0, core.latent.rank)
        seen, position, own = self.seen, self.position, self._biases(keys)
        args = (self.q, k, values, pos, seen.mask, core.scale, seen.words, self.rule)
        extras = _without_defaults((*self.extras, seen.tokens, seen.bounds, position), (None, 0.0, None, None, 0))
        out, emitted, valid = write.parts(write.op("prefill_attend", *args, *extras, **self.memory, **own), 3)
        if fit_fields(self.planned.rule):
            keys |= self._fitted(keys if past else {}, valid)
        read: tuple[Any, ...] = (seen.words, seen.mask, seen.bounds) if past else ("", None, None)
        if self.planned.arrives:
            shown = self.q, k, pos, seen.mask, valid, core.scale, seen.words, self.rule
            extras = _without_defaults((*self.extras, seen.tokens, position), (None, 0.0, None, 0))
            rows = write.op("window_rows", *shown, *extras, **self.memory, **own) if self.planned.windowed else None
            read = (*read, k, keys["v"], rows, *self._read_beside(), *self._rotation())
        before = self.state["cursor"], position, self.rule
        read = _without_defaults(read, ("", *(None,) * len(read[1:])))
        more = {"whole": self.state[WHOLE_AT]} if past and self.planned.rule.demotes else {}
        if self.planned.replays:
            more["replayed"] = self._replayed((self.q, k, values, pos, seen.mask, valid), past, own)
        scored = write.op("score_slots", emitted, past, pos, valid, *before, *read, **more)
        score, keys["stats"], cursor = write.parts(scored, 3)
        names = self._per_slot()
        room = write.method("size", score if self.planned.rule[Ragged].ragged else self.state[names[0]], 2)
        chosen = write.op("select_slots", score, cursor, room)
        state = [*self.state.values()]
        write.op("compact_slots", [keys[name] for name in names], chosen, cursor, state, self.rule)
        if self.planned.merges:
            write.op("merge_slots", k, keys["v"], score, keys["stats"], chosen, state, self.rule)
        if self.planned.refits:
            told = self.q, k, keys["v"], pos, seen.mask, valid, core.scale, seen.words
            extras = _without_defaults((core.softcap, seen.tokens, position), (0.0, None, 0))
            write.op("refit_slots", *told, score, chosen, state, self.rule, *extras, **own)
        if self.planned.rule.demotes:
            write.op("choose_whole", k, keys["v"], pos, score, state, self.rule)
        elif coded(self.planned.rule):
            write.op("keep_whole", self.new_k, self.new_v, valid, position, state, self.rule)
        return self._outputs(out)

    def _replayed(self, call: tuple[Any, ...], past: fx.Node | None, own: dict[str, fx.Node]) -> fx.Node:
        """The scores that a call gives the keys that it repeats."""
        core, seen = self.site.core, self.seen
        before = past, self.state["cursor"], self.write.low.shared[REPEATED]
        extras = (*self.extras, seen.tokens, self.position)
        normed = self.planned.rule[Replay].normed
        read = dict(zip(("wo", "hidden"), self._read_beside(), strict=False)) if normed else {}
        return self.write.op(
            "replay_scores", *call, *before, core.scale, seen.words, self.rule, *extras, **self.memory, **own, **read
        )

    def _per_slot(self) -> list[str]:
        """The state's per-slot fields."""
        return [field.name for field in fields_of(self.planned.rule) if field.per_slot]

    def _keys(self) -> tuple[dict[str, fx.Node | None], fx.Node | None]:
        """What is known of the keys that a call of several tokens sees, by the state's per-slot fields; and the
        statistics that past slots kept.
        """
        names = list(dict.fromkeys(["k", "v", *self._per_slot()]))
        if self.site.phase is not Phase.EXTEND:
            return {**dict.fromkeys(names), "k": self.new_k, "v": self.new_v, **self._codes()}, None
        state = [*self.state.values()]
        joined = self.write.op("join_slots", state, self.new_k, self.new_v, self.position, self.rule)
        keys: dict[str, fx.Node | None] = dict(zip(names, self.write.parts(joined, len(names)), strict=True))
        return keys, keys["stats"]

    def _biases(self, keys: dict[str, fx.Node | None]) -> dict[str, fx.Node]:
        """The keys' biases, where slots have some and there are slots."""
        found = keys.get(BIAS)
        return {} if found is None else {"bias": found}

    def _codes(self) -> dict[str, fx.Node]:
        """The codes of this call's keys and values, where slots hold those; not of fitted ones."""
        names = self._code_names()
        if not names or fit_fields(self.planned.rule):
            return {}
        codes = self.write.op("encode_slots", self.new_k, self.new_v, self.rule)
        return dict(zip(names, self.write.parts(codes, len(names)), strict=True))

    def _fitted(self, keys: dict[str, fx.Node | None], valid: fx.Node) -> dict[str, fx.Node]:
        """The codes of all keys and values, where they hang on fits of heads. keys: as `join_slots` left them."""
        names, state = self._code_names(), self.state
        fits, past = [state[name] for name in fit_fields(self.planned.rule)], [keys[name] for name in names if keys]
        self.write.op("fit_slots", self.q, self.new_k, self.new_v, valid, state["cursor"], fits, self.rule)
        codes = self.write.op("encode_fitted", self.new_k, self.new_v, fits, past, self.rule)
        return dict(zip(names, self.write.parts(codes, len(names)), strict=True))

    def _code_names(self) -> list[str]:
        """The state's fields that hold codes of keys and values."""
        rule = self.planned.rule
        return [name for half in coded(rule) for name in rule[Storage].code_fields(half)]

    def _queries(self) -> fx.Node:
        """The core's queries as [B, Hq, S, D], in the dtype of the cache."""
        core = self.site.core
        axes = core.axes.q
        node = self._permuted(self.write.copy(core.q), axes, _canonical(axes))
        if "N" in axes:
            node = self.write.method("unflatten", node, 0, (-1, self.site.dims["Hq"]))
        elif "G" in axes:
            node = self.write.method("flatten", node, 1, 2)
        node = regrouped(self.write, node, 1, to_model=False)
        dtype = self.site.dtype
        return node if example(core.q).dtype == dtype else self.write.method("to", node, dtype)

    def _heads_first(self, half: Half) -> fx.Node:
        """This call's keys or values as [B, H, S, D]."""
        node = self.write.copy(half.update.new)
        for name, *args in half.layout.to_heads_first:
            node = self.write.method(name, node, *args)
        return node

    def _position(self) -> fx.Node | int:
        """Where this call's tokens begin."""
        low, half = self.write.low, self.site.key
        if self.site.phase is Phase.PREFILL:
            return 0
        assert half.update.past is not None
        if half.update.form is CacheForm.BUFFER:
            return low.shared[POSITION]
        return self.write.method("size", low.copy[half.update.past], half.layout.token_axis)

    def _extras(self) -> tuple[Any, ...]:
        """Sinks, [Hq], or None, and softcap."""
        core = self.site.core
        if core.sinks is None:
            return None, core.softcap
        sinks = self.write.method("reshape", self.write.copy(core.sinks), -1)
        return regrouped(self.write, sinks, 0, to_model=False), core.softcap

    def _memory(self) -> dict[str, fx.Node]:
        """Keys and values of no token, [1 or B, Hkv or Hq, M, ..]."""
        core = self.site.core
        found: dict[str, fx.Node] = {}
        if core.memory is None:
            return found
        for name, joined, layout in zip(("k", "v"), (core.memory.k, core.memory.v), memory_layouts(core), strict=True):
            node = self.write.copy(joined.memory)
            for method, *args in layout.to_heads_first:
                node = self.write.method(method, node, *args)
            of_queries = shape_of(node)[1] == self.site.dims["Hq"]
            found[f"memory_{name}"] = regrouped(self.write, node, 1, to_model=False) if of_queries else node
        return found

    def _read_beside(self) -> tuple[fx.Node | None, ...]:
        """The weight of the output projection, [out, Hq * Dv], the block's hidden states, [B, S, size], and the
        caller's marks, [B, S]; each None if the rule does not read it.
        """
        found, hidden = self.planned.projection, self.planned.hidden
        weight = None if found is None else self.write.ahead(found.weight)
        if found is not None and found.turned:
            weight = self.write.method("transpose", weight, 0, 1)
        return weight, None if hidden is None else self.write.copy(hidden), self.write.low.shared.get(MARKS)

    def _rotation(self) -> tuple[fx.Node, ...]:
        """Queries before their rotation, [B, Hq, S, D], and its angles, [2, 1 or B, S, D], if the rule reads them."""
        found = self.planned.rotation
        if found is None:
            return ()
        angles = [self._angle(x, found.halved) for x in (found.cos, found.sin)]
        return self.write.copy(found.before), self.write.call(torch.stack, angles)

    def _angle(self, angle: fx.Node, halved: bool) -> fx.Node:
        """Cosines or sines as [1 or B, S, D]."""
        node, axes = self.write.copy(angle), len(shape_of(angle))
        node = self.write.call(torch.cat, [node, node], -1) if halved else node
        if axes == 2:
            return self.write.method("unsqueeze", node, 0)
        return node if axes == 3 else self.write.method("squeeze", node, 1)

    def _outputs(self, out: fx.Node) -> list[fx.Node]:
        return [self._of_model(node) for node in from_slots(self.write, out)]

    def _of_model(self, node: fx.Node) -> fx.Node:
        """An attention's output in the axes and the dtype that the model's own core gives."""
        site, axes = self.site, self.site.core.axes.out
        node = regrouped(self.write, node, 1, to_model=True)
        if "N" in axes:
            node = self.write.method("flatten", node, 0, 1)
        elif "G" in axes:
            node = self.write.method("unflatten", node, 1, (site.dims["Hkv"], site.group))
        node = self._permuted(node, _canonical(axes), axes)
        dtype = example(site.core.node).dtype
        return node if dtype == site.dtype else self.write.method("to", node, dtype)

    def _permuted(self, node: fx.Node, axes: str, wanted: str) -> fx.Node:
        return node if axes == wanted else self.write.method("permute", node, *(axes.index(x) for x in wanted))


def _without_defaults(given: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments up to the last that says something else than its default."""
    said = [at for at, (one, default) in enumerate(zip(given, defaults, strict=True)) if not _same(one, default)]
    return given[: said[-1] + 1] if said else ()


def _same(one: Any, default: Any) -> bool:
    return one is default or (not isinstance(one, fx.Node) and one == default)


def _canonical(axes: str) -> str:
    """The order of axes in which an op takes queries and gives outputs."""
    return "".join(letter for letter in "NBHGSD" if letter in axes)
