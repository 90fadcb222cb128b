"""What a benchmark is: jobs, a measurement for each in a process of its own, and what its figures say.

A benchmark is one file in benchmarks/, with

    MINUTES                 about how long it takes on two cores
    jobs(options)           its jobs; each is measured, kept and taken up again by itself
    work(job, save)         in a fresh process: measures, and returns plain data. What it gives to `save` on the way is
                            `job["before"]` for a process that goes on after an interruption
    grids(found)            tables, of the results by the names of their jobs
    aims(found)             figures beside what is aimed at
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

Job = dict[str, Any]
"""`name` of a job, and what else `work` reads; plain data."""
Results = dict[str, dict[str, Any]]
"""What `work` returned, by the names of jobs."""
Save = Callable[[dict[str, Any]], None]

BENCHMARKS = (
    "op_bandwidth",
    "op_bytes",
    "decode",
    "where",
    "prefill",
    "first_token",
    "growth",
    "largest_batch",
    "peak_memory",
    "wrapper",
    "stages",
    "recompilations",
)
"""In the order of the report; each is a file in benchmarks/."""


@dataclass(frozen=True)
class Options:
    """What a run is asked for.

    Attributes:
        quick: small shapes and few rounds: does it run at all?
        long: also what tells less, or takes long.
        device: `cpu` or `cuda`.
        kvpress: the interpreter of an environment with kvpress 0.5.5; "" without.
        llama: likewise with llama-cpp-python.
        rounds: timed steps of each contender; 0 for the benchmark's own.
        only: names of contenders that have this in them.
    """

    quick: bool = False
    long: bool = False
    device: str = "cpu"
    kvpress: str = ""
    llama: str = ""
    rounds: int = 0
    only: str = ""

    def rounds_or(self, usual: int, quick: int = 4) -> int:
        return self.rounds or (quick if self.quick else usual)


@dataclass(frozen=True)
class Grid:
    """A table."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Aim:
    """A figure beside what is aimed at.

    Attributes:
        least: whether the aim is a lower bound.
        aim: None: the figure is shown, nothing is asked of it.
    """

    what: str
    value: float
    aim: float | None
    least: bool = True
    unit: str = "x"

    @property
    def reached(self) -> bool | None:
        if self.aim is None:
            return None
        return self.value >= self.aim if self.least else self.value <= self.aim

    @property
    def verdict(self) -> str:
        """PASS, or how far it is: the factor that is missing, or the difference where the aim is nothing at all."""
        if self.aim is None:
            return "-"
        if self.reached:
            return "PASS"
        if self.aim == 0:
            return f"{self.value:g} above"
        if self.value == 0:
            return "nothing reached"
        factor = self.aim / self.value if self.least else self.value / self.aim
        return f"{factor:.2f}x away"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "reached": self.reached, "verdict": self.verdict}


def module_of(name: str) -> ModuleType:
    """A benchmark's file."""
    return importlib.import_module(f"bench.benchmarks.{name}")
