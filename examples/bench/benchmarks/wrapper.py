"""What kvpass' Python costs a step at batch 1, outside of the compiled code.

A step is a call of the compiled model. Of its time, `code` is spent in what the inner compiler made, piece by piece;
`wrapper` between that and where Dynamo hands over, and around Dynamo: opening stores, positions, shells, what is
watched. `Dynamo` is the rest: guards, and the host's own Python around a graph, which Hugging Face's caches have too.
Parts of the wrapper: `watch`, the walks over what a call is given and leaves; `hooks`, the look at the modules; `open`
and `leave`, stores and their shells.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import smollm2
import torch
from workers import say

from bench.contenders import Contender, Spec, hf, ours, prompt
from bench.suite import Aim, Grid, Job, Options, Results, Save
from bench.timing import quartiles, timed, turned, without_gc
from kvpass.model.compilation import Compilation
from kvpass.model.hooks import Hooks
from kvpass.pipeline.frozen import Checked
from kvpass.pipeline.stitch import Stitched
from kvpass.runtime.bind import Bound
from kvpass.runtime.watch import Call

MINUTES = 2
CONTEXT, WARM_UP = 512, 5
SPECS = (
    hf("dynamic", "eager"),
    *(ours(policy, under) for under in ("eager", "frozen") for policy in ("h2o", "ada_snapkv")),
)


INSIDE = "watch", "hooks", "open", "leave"
"""Parts of the wrapper."""


def jobs(options: Options) -> list[Job]:
    some = SPECS if options.long else SPECS[:-1]
    specs = [spec for spec in some if options.only in spec.name and not (options.quick and spec.under == "frozen")]
    sizes = {"context": 128, "layers": 6} if options.quick else {"context": CONTEXT, "layers": None}
    return [{"name": "batch 1", **sizes, "rounds": options.rounds_or(40), "specs": [one.to_dict() for one in specs]}]


class Clock:
    """Seconds in calls of functions, by what they are; calls inside of calls of the same kind count once."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("call", "dynamo", "bound", "code", *INSIDE), 0.0)
        self.depth = dict.fromkeys(self.seconds, 0)

    def around(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.depth[kind]:
                return function(*args, **kwargs)
            self.depth[kind] += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[kind] += time.perf_counter() - start
                self.depth[kind] -= 1

        return call

    def read(self) -> dict[str, float]:
        found = self.seconds
        self.seconds = dict.fromkeys(found, 0.0)
        return found


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Calls of compiled models, of Dynamo inside of them, of `Bound` inside of that, and of compiled code."""
    run, open_ = Compilation.run, Compilation.__init__
    stitched = Stitched.__init__

    def opened(self: Compilation, *given: Any) -> None:
        open_(self, *given)
        self.compiled = clock.around("dynamo", self.compiled)
        self.without_hooks = clock.around("dynamo", self.without_hooks)

    def cut(self: Stitched, *given: Any) -> None:
        stitched(self, *given)
        self._steps = [(clock.around("code", call), *rest) for call, *rest in self._steps]

    bound = Bound.__init__

    def made(self: Bound, inner: Any, *given: Any) -> None:
        whole = not isinstance(inner.call if isinstance(inner, Checked) else inner, Stitched)
        bound(self, clock.around("code", inner) if whole else inner, *given)

    with ExitStack() as stack:
        for kind, name, new in (
            (Compilation, "__init__", opened),
            (Compilation, "run", clock.around("call", run)),
            (Stitched, "__init__", cut),
            (Bound, "__init__", made),
            (Bound, "__call__", clock.around("bound", Bound.__call__)),
            *((Call, name, clock.around("watch", getattr(Call, name))) for name in ("begin", "compare", "end")),
            (Hooks, "any", clock.around("hooks", Hooks.any)),
            (Bound, "_opened", clock.around("open", Bound._opened)),
            (Bound, "_returned", clock.around("leave", Bound._returned)),
        ):
            stack.enter_context(patch.object(kind, name, new))
        yield


def work(job: Job, save: Save) -> dict[str, Any]:
    torch._dynamo.config.recompile_limit = 64
    device = job["device"]
    model, tokenizer = smollm2.load(layers=job["layers"])
    model.to(device)
    ids = prompt(tokenizer, job["context"] + WARM_UP + job["rounds"], 1).to(device)
    later = ids[:, job["context"] :].split(1, dim=1)
    clock = Clock()
    with watched(clock):
        contenders = [Contender(Spec(**spec), model, ids.shape[1]) for spec in job["specs"]]
        for one in contenders:
            say(f"first steps: {one.spec.name}")
            one.prefill(ids[:, : job["context"]])
            for token in later[:WARM_UP]:
                one.step(token)
        found: dict[str, Any] = {one.spec.name: {"step_s": [], "parts": []} for one in contenders}
        with without_gc():
            for number, token in enumerate(later[WARM_UP:]):
                say(f"round {number + 1} of {job['rounds']}")
                for one in turned(contenders, number):
                    clock.read()
                    mine = found[one.spec.name]
                    mine["step_s"].append(timed(lambda c=one, t=token: c.step(t), device))
                    mine["parts"].append(clock.read())
    return {"layers": model.config.num_hidden_layers, "context": job["context"], "found": found}


def parts(one: dict[str, Any]) -> dict[str, float] | None:
    """Median seconds of a step by what they are spent in; None for who is not kvpass."""
    if not any(part["call"] for part in one["parts"]):
        return None
    each = [
        {
            "code": part["code"],
            "wrapper": part["bound"] - part["code"] + part["call"] - part["dynamo"],
            "Dynamo": part["dynamo"] - part["bound"],
            **{name: part[name] for name in INSIDE},
        }
        for part in one["parts"]
    ]
    return {name: quartiles([part[name] for part in each])[1] for name in each[0]}


def share(one: dict[str, Any]) -> float:
    """Of a step, what kvpass' Python takes."""
    split = parts(one)
    assert split is not None
    return split["wrapper"] / quartiles(one["step_s"])[1]


def grids(found: Results) -> list[Grid]:
    grids = []
    for result in found.values():
        rows, kinds = [], ("code", "Dynamo", "wrapper", *INSIDE)
        for name, one in result["found"].items():
            middle, split = quartiles(one["step_s"])[1], parts(one)
            cells = [f"{1e3 * split[part]:.2f}" if split else "" for part in kinds]
            rows.append([name, f"{1e3 * middle:.1f}", *cells, f"{share(one):.1%}" if split else ""])
        columns = ("contender", "step, ms", *(f"{kind}, ms" for kind in kinds), "wrapper of the step")
        title = f"Python around a step: {result['layers']} layers, {result['context']:,} tokens, batch 1"
        grids.append(Grid(title, columns, rows))
    return grids


def aims(found: Results) -> list[Aim]:
    out = []
    for result in found.values():
        shares = [share(one) for one in result["found"].values() if parts(one)]
        asked = result["layers"] == 30
        if shares:
            what = f"wrapper's share of a step at batch 1, {result['layers']} layers, worst"
            out.append(Aim(what, 100 * max(shares), 3 if asked else None, least=False, unit=" %"))
    return out
