"""Clients, floods and disconnects against a server on a tiny model; every answer is compared with the one that the same
server gave to the same request alone.

    python -P examples/serving/soak.py [--seconds 120] [--clients 8] [--policy h2o] [--budget 0.25] [--out FOLDER]

The model's projections are computed in float64 and rounded: a product of several rows may round otherwise than that of
one, and greedy answers of noise must not hang on the last bit of a logit. Exits with 1 if anything was wrong. Writes
the figures that docs/serving.md quotes (JSON, Markdown).
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import openai
import tiny_llama
import torch
from bench import machine

import kvpass
from serving.app import app
from serving.build import build, wait_until
from serving.cli import budget, size
from serving.engine import Engine, Limits
from serving.lifecycle import Server, settings

NAME, SYSTEM = "tiny", "You answer in few words, and say so if you do not know. " * 3
TEXT = "The cache of a model is the memory of what was said; some of it can go, and some of it must not. " * 6


@contextmanager
def serving(engine: Engine, tokenizer: Any, name: str = NAME) -> Iterator[tuple[openai.OpenAI, Server]]:
    """A server on a free port, in a thread of this process, and a client of it."""
    config = settings(app(engine, tokenizer, name), "127.0.0.1", 0, log_level="warning")
    server = Server(config, engine, 60.0)
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        port = server.servers[0].sockets[0].getsockname()[1]
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            yield client, server
    finally:
        server.should_exit = True
        thread.join()
        engine.close()


def requests(count: int) -> list[dict[str, Any]]:
    """Different ones: chats with and without the system message, prompts of many lengths, greedy and sampled, stops."""
    chosen, found = random.Random(7), []
    for at in range(count):
        words = TEXT[chosen.randrange(90) :][: chosen.choice([3, 20, 60, 150, 300, 450])]
        one: dict[str, Any] = {"max_tokens": chosen.choice([1, 5, 20, 40, 70]), "temperature": 0.0}
        if at % 4 == 3:
            one |= {"temperature": 0.8, "top_p": 0.9, "seed": at}
        if at % 5 == 4:
            one["stop"] = ["e", "th"]
        if at % 3:
            system = [{"role": "system", "content": SYSTEM}] if at % 3 == 1 else []
            one["messages"] = [*system, {"role": "user", "content": words}]
        else:
            one["prompt"] = words
        found.append(one)
    return found


def asked(client: openai.OpenAI, one: dict[str, Any], stream: bool = False, pieces: int | None = None) -> Any:
    """(text, why it ended); of a stream that its client leaves after some pieces, None."""
    chat = "messages" in one
    create = client.chat.completions.create if chat else client.completions.create
    said = create(model=NAME, stream=stream, **one)
    if not stream:
        choice = said.choices[0]
        return (choice.message.content if chat else choice.text), choice.finish_reason
    text, reason = "", None
    with said:
        for number, piece in enumerate(said):
            if pieces is not None and number >= pieces:
                return None
            choice = piece.choices[0]
            text += (choice.delta.content if chat else choice.text) or ""
            reason = choice.finish_reason or reason
    return text, reason


class Soak:
    """
    Attributes:
        counts: what happened, by name. wrong: what should not have.
    """

    def __init__(self, client: openai.OpenAI, some: list[dict[str, Any]]) -> None:
        self.client, self.some = client, some
        self.alone = [asked(client, one) for one in some]
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.over = threading.Event()

    def one(self, chosen: random.Random) -> None:
        """A request, answered or left."""
        at, way = chosen.randrange(len(self.some)), chosen.random()
        try:
            if way < 0.2:
                left = asked(self.client, self.some[at], stream=True, pieces=chosen.randrange(4)) is None
                self.counts["left" if left else "answered"] += 1
                return
            got = asked(self.client, self.some[at], stream=way < 0.6)
        except openai.RateLimitError as error:
            self.counts["refused"] += 1
            if not error.response.headers.get("retry-after"):
                self.wrong.append("429 without Retry-After")
            time.sleep(0.2)
            return
        except openai.OpenAIError as error:
            self.wrong.append(f"request {at}: {error!r}")
            return
        self.counts["answered"] += 1
        if got != self.alone[at]:
            self.wrong.append(f"request {at}: {got} together, {self.alone[at]} alone")

    def visitor(self, seed: int) -> None:
        chosen = random.Random(seed)
        while not self.over.is_set():
            self.one(chosen)

    def floods(self, every: float, size: int) -> None:
        """Many at once, now and then: more than may wait."""
        seed = 1000
        while not self.over.wait(every):
            self.counts["floods"] += 1
            with ThreadPoolExecutor(size) as pool:
                for _ in range(size):
                    seed += 1
                    pool.submit(self.one, random.Random(seed))


def soaked(
    engine: Engine, client: openai.OpenAI, seconds: float, clients: int, kinds: int, least: int = 0
) -> dict[str, Any]:
    """The figures of a run, with what was wrong in them.

    Args:
        least: answers, however long they take; and a disconnect and a refusal.
    """
    soak = Soak(client, requests(kinds))
    wait_until(lambda: engine.idle)
    before, graphs, started = states(), len(engine.model.kvpass.graphs), time.monotonic()
    threads = [threading.Thread(target=soak.visitor, args=(seed,)) for seed in range(clients)]
    threads.append(threading.Thread(target=soak.floods, args=(min(5.0, seconds / 4), engine.limits.queue + 16)))
    alive = threading.active_count()
    for thread in threads:
        thread.start()
    memory = []

    def enough() -> bool:
        counts = soak.counts
        return not least or bool(counts["answered"] >= least and counts["left"] and counts["refused"])

    while time.monotonic() - started < seconds or not enough():
        time.sleep(min(1.0, seconds / 20))
        memory.append(resident())
    soak.over.set()
    for thread in threads:
        thread.join()
    took = time.monotonic() - started
    wait_until(lambda: engine.idle and engine.held == engine.admission.base)
    quarter = max(1, len(memory) // 4)
    early, late = (sum(part) / len(part) for part in (memory[quarter : 2 * quarter] or memory, memory[-quarter:]))
    return {
        "seconds": round(took, 1),
        "clients": clients,
        "policy": str(engine.model.kvpass.policy.name),
        "budget": str(engine.model.kvpass.policy.asked),
        **{name: soak.counts[name] for name in ("answered", "left", "refused", "floods")},
        "tokens_per_s": round(engine.metrics.generated._value.get() / took, 1),
        "kv_budget_bytes": engine.admission.budget,
        "kv_peak_bytes": engine.peak,
        "kv_prefix_bytes": engine.admission.base,
        "kv_bytes_after": engine.held,
        "graphs_compiled_meanwhile": len(engine.model.kvpass.graphs) - graphs,
        "threads_more": max(0, threading.active_count() - alive),
        "states_more": states() - before,
        "resident_growth_percent": round(100 * (late / early - 1), 2),
        "wrong": soak.wrong[:20],
    }


def states() -> int:
    """Layers' states that live in this process."""
    gc.collect()
    return sum(type(one).__name__ == "SlotStore" for one in gc.get_objects())


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def problems(figures: dict[str, Any], memory: bool) -> list[str]:
    """What must not be, in words.

    Args:
        memory: the run was long enough to look at the process' memory.
    """
    found = list(figures["wrong"])
    checks = {
        "caches held more than the budget": figures["kv_peak_bytes"] > figures["kv_budget_bytes"],
        "caches are left": figures["kv_bytes_after"] != figures["kv_prefix_bytes"],
        "states are left": figures["states_more"] > 0,
        "threads are left": figures["threads_more"] > 0,
        "graphs were compiled": figures["graphs_compiled_meanwhile"] > 0,
        "nothing was answered": figures["answered"] == 0,
        "memory grew": memory and figures["resident_growth_percent"] > 2,
    }
    return found + [what for what, true in checks.items() if true]


class Exact(torch.nn.Linear):
    """A projection whose rows do not depend, but for one in a thousand million, on how many there are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.double(), self.weight.double()).to(x.dtype)


def exact_model() -> tuple[Any, Any]:
    """(tiny random model, tokenizer)."""
    model, tokenizer = tiny_llama.load()
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Exact
    return model, tokenizer


def engine_of(policy: Any, share: Any, kv_bytes: int, limits: Limits, model: Any = None) -> tuple[Engine, Any]:
    """(engine, tokenizer) of the model above, or of this one."""
    own, tokenizer = exact_model()
    model = own if model is None else model
    compiled = kvpass.compile(model, policy, share, inner="eager")
    return build(compiled, tokenizer, kv_bytes, limits, [SYSTEM]), tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--policy", default="h2o")
    parser.add_argument("--budget", type=budget, default=0.25)
    parser.add_argument("--kv-bytes", type=size, default="1MB")
    parser.add_argument("--queue", type=int, default=16)
    parser.add_argument("--out", type=Path, help="folder for the figures")
    args = parser.parse_args()
    engine, tokenizer = engine_of(args.policy, args.budget, args.kv_bytes, Limits(queue=args.queue))
    with serving(engine, tokenizer) as (client, _):
        figures = soaked(engine, client, args.seconds, args.clients, 24)
    found = problems(figures, args.seconds >= 60)
    figures |= {"date": date.today().isoformat(), "machine": machine.describe()}
    print(json.dumps(figures, indent=2))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        name = f"{figures['date']}-{machine.slug(figures['machine'])}-{figures['policy']}"
        (args.out / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n")
        rows = [f"| {key.replace('_', ' ')} | {value} |" for key, value in figures.items() if key != "machine"]
        (args.out / f"{name}.md").write_text("\n".join(["| | |", "| --- | --- |", *rows]) + "\n")
    for what in found:
        print(f"WRONG: {what}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
