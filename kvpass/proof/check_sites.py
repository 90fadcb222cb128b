"""`verify=True`: each site at full budget against the unmodified subgraph, on the first real inputs of its graph.

The rewritten graph is interpreted once on copies of the state, to see each site's real q, new K, new V and mask. The
site's own nodes of the captured graph then run on a dense past: the live keys at their positions, normal noise where
tokens were evicted (their keys are gone, and any keys serve to compare). The ops run on the same past as slots, all
positions in a random slot order, with a rule that evicts nothing. Both outputs must agree; afterwards the state must
hold exactly the keys and values that came in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from kvpass.errors import VerificationError
from kvpass.graph.extract import functions_of
from kvpass.kernels.attention.masks import visible
from kvpass.kernels.attention.visibility import Sees, Shown
from kvpass.kernels.codecs.storage import coded
from kvpass.kernels.decode_attend.functional import supports
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.moves import even
from kvpass.kernels.slots.state import State
from kvpass.plan.plan import Plan
from kvpass.plan.site_plan import SitePlan
from kvpass.proof.isolate import Isolated
from kvpass.proof.past import all_slots, dense_past
from kvpass.runtime.shell import find
from kvpass.sites.site import Site
from kvpass.terms import Phase

log = logging.getLogger(__name__)

ROUNDING = {torch.float32: 2.0**-15, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}
"""Allowed difference per unit of max|v|, an output being a mean of values. float16 and bfloat16: probabilities and
output are rounded once on each side, 4 x 2^-11 and 4 x 2^-8, doubled. float32: the fast exp of torch's CPU kernel has
20 good bits; 5 bits of room for sums in another order."""

LOGIT_ROUNDING = 4 * torch.finfo(torch.float32).eps
"""And per unit of the largest possible logit |q| |k| scale: logits are float32 sums on both sides, and an error e in a
logit moves its probability by a factor 1 + e."""


def checked_once(inner: Callable[..., Any], original: fx.GraphModule, lowered: Any, plan: Plan) -> Callable[..., Any]:
    """Wrap a compiled rewritten graph so that its first call checks every site first.

    Args:
        inner: takes the original inputs, then the state tensors of each site.
        original: the captured graph, unmodified.
        lowered: the `Lowered` graph that `inner` was compiled from.
        plan: of the same graph.

    Raises:
        VerificationError: from the first call; a site disagrees.
    """
    pending = [(original, lowered, plan)]

    def call(*args: Any) -> Any:
        if pending:
            check(*pending[0], args)
            pending.clear()  # lets go of the graphs
        return inner(*args)

    return call


def check(original: fx.GraphModule, lowered: Any, plan: Plan, args: Sequence[Any]) -> None:
    """Check all sites of a graph on the inputs of one call; the inputs stay as they are.

    Raises:
        VerificationError: naming the site, its source line, the largest error, and what to do.
    """
    copies = [_private(a) for a in args]
    with torch.no_grad(), _quiet_random(args):
        checks = [_Check(original, planned, args) for planned in plan.sites]
        inputs = lowered.gm.graph.find_nodes(op="placeholder")
        given = dict(zip(inputs, copies, strict=True))
        both = zip(lowered.states, plan.sites, strict=True)
        states = [State.of([given[node] for node in nodes], planned.rule).clone() for nodes, planned in both]
        watcher = _Watcher(lowered.gm, checks, states)
        watcher.borders |= _values(original, lowered.masks_gone & set(_borders(checks)), args)
        watcher.run(*copies)
    log.info("verify: %d site(s) agree with the unmodified graph at full budget", len(plan.sites))


def _borders(checks: list[_Check]) -> list[fx.Node]:
    """Nodes of the captured graph whose values the checks need."""
    return [node for one in checks for node in one.dense.wanted.values()]


def _values(original: fx.GraphModule, nodes: Set[fx.Node], args: Sequence[Any]) -> dict[str, Any]:
    """Masks that the rewritten graph does not compute any more."""
    wanted = sorted(nodes)
    found = functions_of(original, wanted, limit=len(original.graph.nodes))(args) if wanted else ()
    return {node.name: value for node, value in zip(wanted, found, strict=True)}


class _Watcher(fx.Interpreter):
    """Runs the rewritten graph; hands each site's inputs to its check before the ops change the state."""

    def __init__(self, gm: fx.GraphModule, checks: list[_Check], states: list[State]) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.states = states
        self.checks = checks
        self.borders: dict[str, Any] = dict.fromkeys(n.name for n in _borders(checks))
        self.at = 0
        self.joined: tuple[Any, ...] | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.borders:
            self.borders[n.name] = value
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = str(target)
        if name == "kvpass.join_slots.default":
            self.joined = args
        elif name == "kvpass.prefill_attend.default":
            k, v, position = (args[1], args[2], 0) if self.joined is None else self.joined[1:4]
            self._check((args[0], k, v), args[4], position, (args[8:10], kwargs), args[6], _padded(args[10:11], 1)[0])
        elif name == "kvpass.decode_attend.default":
            words, tokens = _padded(args[12:14], 2)
            self._check(args[:3], args[3], args[5], (args[8:10], kwargs), words or "", tokens)
        return super().call_function(target, args, kwargs)

    def _check(self, qkv: Any, mask: Tensor | None, position: int, given: Any, words: str, tokens: Any) -> None:
        shown = Shown(Sees.parse(words), qkv[0].shape[2], int(position), tokens, None, mask)
        (q, k, v), (extras, memory) = qkv, given
        self.checks[self.at].run(_Call(q, k, v, shown, extras, memory, self.states[self.at]), self.borders)
        self.at, self.joined = self.at + 1, None


@dataclass(frozen=True)
class _Call:
    """What one site is given: q `[B, Hq, S, D]`, new k and v `[B, Hkv, S, D]`, what is shown, and the state before;
    `extras` are sinks and softcap, if the site has any, and `memory` its memory keys and values by argument.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    shown: Shown
    extras: tuple[Any, ...]
    memory: dict[str, torch.Tensor]
    state: State

    @property
    def position(self) -> int:
        """Of the first query."""
        return self.shown.position


class _Check:
    """One site: its unmodified nodes as a small graph, and the comparison."""

    def __init__(self, original: fx.GraphModule, planned: SitePlan, args: Sequence[Any]) -> None:
        self.site: Site = planned.site
        self.held, growing = planned.rule, planned.rule.growing
        self.rule = growing if supports(growing) and not coded(growing) else Rule()
        self.dense = Isolated(original, planned.site, args)

    def run(self, call: _Call, values: dict[str, Any]) -> None:
        if self.site.core.latent is not None or self.site.mixed is not None:
            log.warning("verify: %s holds keys and values in another form than the model; not checked", self.site.name)
            return
        call = replace(call, state=even(call.state))
        k, v = (dense_past(call.state, self.held, (call.k, call.v)[half], call.position, half) for half in (0, 1))
        state = all_slots(k, v, self.rule, room=call.q.shape[2] + 1)
        try:
            actual = _run_ops(self.site, call, state, self.rule)
        except ValueError as error:
            self._fail(f"is refused by its own ops: {error}")
        expected = self.dense(values, (k, v))
        if self.site.core.tiled:  # in the order of the ops' heads
            expected = expected.unflatten(1, (self.site.group, -1)).transpose(1, 2).flatten(1, 2)
        self._compare_outputs(call, actual, expected, k, v)
        self._compare_state(call, state, k, v)

    def _compare_outputs(
        self, call: _Call, actual: torch.Tensor, expected: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        error = (actual.double() - expected.double()).abs().nan_to_num(nan=float("inf"))
        error = error.masked_fill(actual.isnan() & expected.isnan(), 0.0)
        error = error.masked_fill(~_sees_a_key(call)[..., None], 0.0)
        worst, allowed = float(error.max()), _allowed(call, k, v, self.site.core.scale)
        log.debug("verify %s: error %.2e, allowed %.2e", self.site.name, worst, allowed)
        if worst > allowed:
            b, h, i, _ = (int(at) for at in torch.unravel_index(error.argmax(), error.shape))
            share = float((error.amax(-1) > allowed).double().mean())
            self._fail(
                f"differs by {worst:.3g} (allowed {allowed:.3g}) in {share:.0%} of the output rows, "
                f"most at batch {b}, query head {h}, query {i}"
            )

    def _compare_state(self, call: _Call, state: State, k: torch.Tensor, v: torch.Tensor) -> None:
        """After a call that evicts nothing every valid token is in one slot, its key and value bit for bit."""
        used, pos = state.used(), state.pos
        valid = call.shown.arrived(len(pos), pos.device)
        wanted = torch.cat([valid.new_ones(len(valid), call.position), valid], 1)[:, None].long()
        places = torch.where(used & (pos >= 0), pos, wanted.shape[2]).long()
        held = torch.zeros(*pos.shape[:2], wanted.shape[2] + 1, dtype=torch.long, device=pos.device)
        held.scatter_add_(2, places, used.long())
        wrong = int((held[..., :-1] != wanted).sum())
        if wrong:
            self._fail(f"keeps the wrong positions: {wrong} tokens are missing from the slots, or are there twice")
        for name, slots, past, new in (("keys", state.k, k, call.k), ("values", state.v, v, call.v)):
            index = pos.clamp(min=0).long()[..., None].expand(*pos.shape, slots.shape[3])
            changed = used & (slots != torch.cat([past, new], 2).gather(2, index)).any(-1)
            if bool(changed.any()):
                self._fail(f"keeps wrong {name}: {int(changed.sum())} slots differ from what was cached")

    def _fail(self, what: str) -> NoReturn:
        raise VerificationError(
            f"verify=True: the {self.site.phase.value} of a site, run at full budget, {what}",
            where=f"{self.site.name}, {self.site.source}",
            hint="a bug in kvpass, not in the model: please report it with the folder of debug=True; until it is fixed "
            "run the model without kvpass",
        )


def _run_ops(site: Site, call: _Call, state: State, rule: Rule) -> torch.Tensor:
    """The ops that replace the site, as `lower` emits them."""
    ops, core, text, held = torch.ops.kvpass, site.core, rule.encode(), state.tensors()
    shown, (sinks, softcap), position = call.shown, _padded(call.extras, 2), call.position
    words, mask, tokens = shown.sees.encode(), shown.mask, shown.tokens
    out: torch.Tensor
    if site.phase is Phase.DECODE:
        args = (call.q, call.k, call.v, mask, held, position, core.scale, text, sinks, softcap or 0.0)
        out = ops.decode_attend(*args, sees=words, tokens=tokens, **call.memory)
        return out
    keys: dict[str, Any] = dict.fromkeys(field.name for field, _ in state.per_slot())
    keys |= {"k": call.k, "v": call.v}
    if site.phase is Phase.EXTEND:
        keys = dict(zip(keys, ops.join_slots(held, call.k, call.v, position, text), strict=True))
    past, where, shape = keys["stats"], keys["pos"], (core.scale, words, text, sinks, softcap or 0.0)
    given = call.q, keys["k"], keys["v"], where, mask, *shape
    out, emitted, valid = ops.prefill_attend(*given, tokens=tokens, position=position, **call.memory)
    score, keys["stats"], after = ops.score_slots(emitted, past, where, valid, state.cursor, position, text)
    ops.compact_slots([*keys.values()], ops.select_slots(score, after, state.slots), after, held, text)
    return out


def _padded(given: Sequence[Any], count: int) -> tuple[Any, ...]:
    """The arguments, None for those that were left out."""
    return (*given, *(None,) * (count - len(given)))


def _sees_a_key(call: _Call) -> torch.Tensor:
    """Query rows that see some key, bool `[B, Hq, S]`. The others are padding: what they give is nobody's business."""
    shown, keys = call.shown, call.position + call.q.shape[2]
    where = torch.arange(keys, device=call.q.device)[None, None]
    seen = shown.keys(where, 0, call.q.shape[2])
    if shown.mask is not None:
        seen = seen & visible(shown.mask[..., :keys])
    return seen.any(-1).expand(call.q.shape[:3])


def _allowed(call: _Call, k: torch.Tensor, v: torch.Tensor, scale: float) -> float:
    """Largest difference that rounding explains: see ROUNDING and LOGIT_ROUNDING."""
    keys, values = ([call.memory[name]] if name in call.memory else [] for name in ("memory_k", "memory_v"))
    longest = max(float(t.float().norm(dim=-1).max()) for t in (k, call.k, *keys) if t.numel())
    logit = abs(scale) * longest * float(call.q.float().norm(dim=-1).max())
    largest = max(float(t.abs().max()) for t in (v, call.v, *values) if t.numel())
    return largest * (ROUNDING[call.q.dtype] + LOGIT_ROUNDING * logit)


def _private(value: Any) -> Any:
    """A copy of what a graph may change: states, buffers; not parameters, nor shells, whose copy would be dense."""
    keep = not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter) or find(value) is not None
    return value if keep else value.clone()


def _quiet_random(args: Sequence[Any]) -> AbstractContextManager[Any]:
    """Leaves the random state as it was, for models that draw numbers."""
    devices = {a.device.index or 0 for a in args if isinstance(a, torch.Tensor) and a.device.type == "cuda"}
    return torch.random.fork_rng(devices=sorted(devices))
