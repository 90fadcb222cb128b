"""Nothing that takes long is silent: what is traced or compiled, how long it took last time, how long it took now.

Lines go to stderr; KVPASS_PROGRESS=0 silences them. What is over within two seconds is not worth a line.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from torch import fx

from kvpass.debug import progress_wanted
from kvpass.graph.calls import example

PATIENCE = 2.0
"""Seconds that nobody wonders about."""

REMEMBERED = 500
"""Graphs whose compile times are kept."""

HINT = " (KVPASS_PROGRESS=0 silences this)"


@contextmanager
def compiling(title: str, inner: str, gm: fx.GraphModule, pieces: str = "") -> Iterator[None]:
    """Around the inner compilation of a graph. Says what it is at once if it took long last time, else when it does.

    Args:
        title: of the graph, `graph 1 (prefill, 30 layers)`.
        pieces: what of it is compiled, if it is cut.
    """
    _traced()
    if not _wanted():
        yield
        return
    key = fingerprint(inner, gm)
    last = durations().get(key)
    text = f"compiling {title} with {inner}{pieces and f', {pieces}'}"
    text += f"; it took {last:.0f} s last time" if last is not None and last >= 1 else ""
    with _said(text, PATIENCE if last is None or last < PATIENCE else 0) as spent:
        yield
    remember(key, spent())


@contextmanager
def tracing() -> Iterator[None]:
    """Around a call of a compiled model: says so if Dynamo traces it for long."""
    from torch._dynamo.callback import callback_handler

    if not _wanted():
        yield
        return
    callback_handler.register_start_callback(_begun)
    callback_handler.register_end_callback(_traced)
    try:
        yield
    finally:
        _traced()
        callback_handler.remove_start_callback(_begun)
        callback_handler.remove_end_callback(_traced)


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing is said here, by this thread: the caller says what goes on in words of its own."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


def _wanted() -> bool:
    return progress_wanted() and not _quiet.get()


_quiet: ContextVar[bool] = ContextVar("kvpass_quiet", default=False)

_tracing: list[Timer] = []


def _begun(*_: Any) -> None:
    _tracing.append(_timer("tracing the model", PATIENCE))


def _traced(*_: Any) -> None:
    while _tracing:
        _tracing.pop().cancel()


@contextmanager
def _said(text: str, after: float) -> Iterator[Any]:
    """Say a text after some seconds, or at once; afterwards how long it took, if it was said. Yields a clock."""
    start = time.perf_counter()
    timer = _timer(text, after)
    try:
        yield lambda: time.perf_counter() - start
    finally:
        timer.cancel()
    spent = time.perf_counter() - start
    if spent > after:
        say(f"{text.partition(' with ')[0].replace('compiling', 'compiled')} in {spent:.1f} s")


def _timer(text: str, after: float) -> Timer:
    timer = Timer(after, say, [text + " ..." + HINT])
    timer.daemon = True
    timer.start() if after else timer.function(*timer.args)
    return timer


def say(line: str) -> None:
    print(f"kvpass: {line}", file=sys.stderr, flush=True)


def fingerprint(inner: str, gm: fx.GraphModule) -> str:
    """Equal for graphs that take equally long to compile: equal calls and sizes, the same inner compiler and torch."""
    text = hashlib.sha256(f"{inner} {torch.__version__}".encode())
    for node in gm.graph.nodes:
        value = example(node)
        size = [s if isinstance(s, int) else "s" for s in value.shape] if isinstance(value, torch.Tensor) else ""
        text.update(f"{node.op} {getattr(node.target, '__name__', node.op)} {size};".encode())
    return text.hexdigest()[:24]


def durations() -> dict[str, float]:
    """Seconds that compiling took the last time, by fingerprint; lie beside Inductor's own caches and go with them."""
    try:
        found = json.loads(_file().read_text())
        return {str(key): float(seconds) for key, seconds in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def remember(key: str, seconds: float) -> None:
    """Keep a duration for later processes; a folder that cannot be written is no error."""
    kept = durations()
    kept.pop(key, None)
    kept[key] = round(seconds, 2)
    try:
        file = _file()
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as scratch:
            json.dump(dict([*kept.items()][-REMEMBERED:]), scratch)
        os.replace(scratch.name, file)
    except OSError:
        return


def _file() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "kvpass_compile_seconds.json"
