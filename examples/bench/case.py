"""One case (context x batch) with all its contenders, in a process of its own.

Started by run.py: `python -P examples/bench/case.py JOB FOLDER`; says what it is doing, a line each, and
writes FOLDER/<name>.json. Contenders take turns, prefill by prefill and decode step by decode step, in a
rotating order: the machine's drift hits all alike.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import smollm2
import torch
from torch._dynamo.utils import calculate_time_spent, counters
from workers import say

from bench.bandwidth import read_bandwidth
from bench.contenders import Contender, Spec, weight_bytes

WARM_UP = 4  # decode steps; by then the first decode (static lengths) and the general one are compiled


def prompt(tokenizer: Any, context: int, batch: int) -> torch.Tensor:
    """Real text, [batch, context]: each row goes on where the one before ended."""
    whole = tokenizer(smollm2.text(6 * context * batch), add_special_tokens=False, return_tensors="pt").input_ids
    return whole[0, : context * batch].reshape(batch, context).contiguous()


class CompileTime:
    """What Dynamo spent since this was made: in all, and on capture (all but the backend)."""

    def __init__(self) -> None:
        self.start = self.spent()

    @staticmethod
    def spent() -> tuple[float, float]:
        spent = calculate_time_spent()
        return spent.get("entire_frame_compile", 0.0), spent.get("backend_compile", 0.0)

    def add_to(self, result: dict[str, Any]) -> float:
        """Adds to the contender's figures; the seconds in all."""
        total, backend = (now - then for now, then in zip(self.spent(), self.start, strict=True))
        result["compile_s"] = result.get("compile_s", 0.0) + total
        result["capture_s"] = result.get("capture_s", 0.0) + total - backend
        return total


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def timed(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def rotated(contenders: list[Contender], by: int) -> list[Contender]:
    by %= len(contenders)
    return contenders[by:] + contenders[:by]


def first_prefill(contender: Contender, ids: torch.Tensor, result: dict[str, Any]) -> None:
    """The call that compiles. `prefill_net_s` is what it took beyond compiling."""
    spent = CompileTime()
    wall = timed(lambda: contender.prefill(ids))
    result["prefill_net_s"] = wall - spent.add_to(result)


def time_prefills(contenders: list[Contender], ids: torch.Tensor, job: dict[str, Any], found: dict[str, Any]) -> None:
    for contender in contenders:
        say(f"prefill, first call: {contender.spec.name}")
        first_prefill(contender, ids, found[contender.spec.name])
        gc.collect()
    repeats = {"eager": job["prefills"], "inductor": job["inductor_prefills"]}
    for repeat in range(max(repeats.values())):
        for contender in rotated(contenders, repeat):
            if repeat < repeats[contender.spec.inner]:
                say(f"prefill {repeat + 1}: {contender.spec.name}")
                seconds = timed(lambda c=contender: c.prefill(ids))
                found[contender.spec.name].setdefault("prefill_s", []).append(seconds)
                gc.collect()


def warm_up(contenders: list[Contender], found: dict[str, Any]) -> None:
    for contender in contenders:
        say(f"first decode steps: {contender.spec.name}")
        spent, compiled = CompileTime(), graphs()
        for _ in range(WARM_UP):
            contender.step()
        spent.add_to(found[contender.spec.name])
        found[contender.spec.name]["decode_graphs"] = graphs() - compiled


def time_decodes(contenders: list[Contender], rounds: int, found: dict[str, Any]) -> None:
    gc.collect()
    gc.disable()
    before = graphs()
    for number in range(rounds):
        say(f"decode, round {number + 1} of {rounds}")
        for contender in rotated(contenders, number):
            found[contender.spec.name].setdefault("step_s", []).append(timed(contender.step))
    gc.enable()
    for contender in contenders:
        found[contender.spec.name]["compiled_while_timing"] = graphs() - before


def closing(contenders: list[Contender], found: dict[str, Any]) -> None:
    reference = contenders[0].said
    for contender in contenders:
        mine = found[contender.spec.name]
        same = [a == b for a, b in zip(reference, contender.said, strict=True)]
        mine["same_tokens"] = sum(same) / len(same)
        mine["kv_bytes"] = contender.kv_bytes()
        mine["timings_s"] = contender.timings()


@torch.no_grad()
def main(job: dict[str, Any], folder: Path) -> None:
    torch._dynamo.config.recompile_limit = 64  # all contenders share the code object of the model's forward
    say("measuring read bandwidth")
    bandwidth = read_bandwidth()
    say("loading SmolLM2-135M-Instruct")
    model, tokenizer = smollm2.load()
    ids = prompt(tokenizer, job["context"], job["batch"])
    specs = [Spec(**spec) for spec in job["contenders"]]
    length = job["context"] + WARM_UP + job["rounds"] + 1
    contenders = [Contender(spec, model, length) for spec in specs]
    found: dict[str, Any] = {spec.name: {"spec": spec.to_dict()} for spec in specs}
    time_prefills(contenders, ids, job, found)
    warm_up(contenders, found)
    time_decodes(contenders, job["rounds"], found)
    closing(contenders, found)
    result = {
        **{key: job[key] for key in ("name", "context", "batch", "rounds")},
        "read_bandwidth": bandwidth,
        "weight_bytes": weight_bytes(model),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "contenders": found,
    }
    (folder / f"{job['name']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
