"""Cells side by side: a process for each core, because decoding and capture leave a second one idle."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Any

import smollm2
import torch
from transformers.utils import logging as transformers_logging

from quality.measure import Lab, Say, measure
from quality.reference import Reference
from quality.store import Cell, Settings, Store

Outcome = dict[str, Any] | str
"""What was found, or the error's words."""

_WORKER: list[tuple[Lab, Store]] = []


def outcomes(lab: Lab, store: Store, cells: list[Cell], jobs: int, say: Say) -> Iterator[tuple[Cell, Outcome]]:
    """Each cell with what came of it, in the order in which they end. References must lie in the store."""
    if jobs == 1:
        for cell in cells:
            yield cell, _attempt(lab, store, cell, lambda doing, cell=cell: say(f"{cell.name}: {doing}"))
        return
    spawn, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, spawn, _begin, (store.settings, store.folder.parent, threads)) as pool:
        waiting = {pool.submit(_work, cell): cell for cell in cells}
        for done in as_completed(waiting):
            say(f"{jobs} at a time")
            try:
                yield waiting[done], done.result()
            except BrokenProcessPool as error:  # a worker was killed: for want of memory, most likely
                yield waiting[done], f"{type(error).__name__}: {error}"


def _begin(settings: Settings, root: Path, threads: int) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    _WORKER.append((Lab(*smollm2.load(), settings), Store(settings, root)))


def _end_with_parent() -> None:
    """A worker whose parent was killed would go on measuring for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(cell: Cell) -> Outcome:
    return _attempt(*_WORKER[0], cell, lambda doing: None)


def _attempt(lab: Lab, store: Store, cell: Cell, say: Say) -> Outcome:
    try:
        return measure(lab, cell, _reference(store.reference_path(cell.context)), say, store.known(cell))
    except Exception as error:  # noted, and the rest goes on
        return f"{type(error).__name__}: {error}"


@lru_cache(maxsize=1)
def _reference(path: Path) -> Reference:
    return Reference(**torch.load(path))
