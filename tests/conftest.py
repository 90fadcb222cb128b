"""Every test starts from the same seed and an empty Dynamo, never asks the network, and uses nothing deprecated."""

from __future__ import annotations

import gc
import logging
import os
import sys
import types
import weakref
from collections.abc import Iterator
from itertools import count
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING"] = "1"  # torch warns, and raises where CI is set

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
for name in (
    "oracle",
    "models",
    "gpu",
    "spellings",
    "reliability",
):  # not tests/ on sys.path: its folders kvpass and kernels would shadow the real ones
    package = types.ModuleType(name)
    package.__path__ = [str(ROOT / "tests" / name)]
    sys.modules[name] = package

import pytest  # noqa: E402
import torch  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


class Deprecations(logging.Handler):
    """What transformers logs about names of ours that will go; pyproject.toml turns the warnings of others into errors.
    It logs each only once in a process."""

    said: list[str]

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "deprecated" in text:
            self.said.append(text)


TESTS = count(1)

DEPRECATIONS = Deprecations()
logging.getLogger("transformers").addHandler(DEPRECATIONS)


@pytest.fixture(autouse=True)
def nothing_deprecated() -> Iterator[None]:
    DEPRECATIONS.said.clear()
    yield
    assert not DEPRECATIONS.said, "a name that will go; for the cache, say it by examples/spelling.py"


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    if "one_trace" in request.fixturenames:  # the next test that does not share traces resets
        yield
    else:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()
        forget_guards()
    if next(TESTS) % 25 == 0:
        set_aside()


@pytest.fixture
def one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilations of one and the same module share what Dynamo traced (models/traced.py)."""
    from models import traced

    monkeypatch.setattr("kvpass.model.compilation.isolated", traced.isolated)


@pytest.fixture
def in_torch() -> Iterator[None]:
    """Ops run by torch's operations: where one form of them is compared with another bit for bit, or broken."""
    from kvpass.kernels.choose import use

    with use("reference"):
        yield


def forget_guards() -> None:
    """Torch keeps the guards of every graph for as long as what they looked at lives, and that is modules, types and
    code: 5,000 objects for a small model. Thousands of tests later each garbage collection takes seconds.
    """
    for finalizer, info in list(weakref.finalize._registry.items()):
        method = getattr(info.func, "func", info.func)
        if isinstance(getattr(method, "__self__", None), torch._dynamo.guards.CheckFunctionManager):
            finalizer.detach()


def set_aside() -> None:
    """What is left by now stays, imports and what torch remembers of compiled models: collections need not look at it.
    Late in a run of 4,000 tests, one that compiles took 1.5 times as long as alone (worker: 2.4 GB).
    """
    gc.collect()
    gc.freeze()


def pytest_configure() -> None:
    """Dynamo makes so many objects that by Python's thresholds a sixth of a run goes into looking at them.
    What it remembers of single ops costs more than it saves in models of two layers: a third of a trace; and for
    pytest's log handler it would print every graph. Examples and others in processes of their own trace as users do.
    """
    gc.set_threshold(50_000, 20, 50)
    torch._dynamo.config.fake_tensor_cache_enabled = False
    torch._dynamo.config.run_gc_after_compile = False
    logging.getLogger("torch.__trace").propagate = True  # pytest listens to loggers that do not propagate


def pytest_collection_finish() -> None:
    set_aside()


@pytest.hookimpl(tryfirst=True)  # before pytest looks at marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    leave_some(items)
    long_ones_first(items)


def leave_some(items: list[pytest.Item]) -> None:
    """Of a test with the mark `some(n)`, n cases spread over all of them; the others are `wide`."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("some") and not item.get_closest_marker("wide"):
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    for alike in cases.values():
        marker = alike[0].get_closest_marker("some")
        assert marker is not None
        (count,) = marker.args
        step = max(len(alike) - 1, 1) / max(count - 1, 1)
        left = {round(i * step) for i in range(count)}
        for at, item in enumerate(alike):
            if at not in left:
                item.add_marker("wide")


def long_ones_first(items: list[pytest.Item]) -> None:
    """Long tests that run processes of their own come first: what is behind them can be taken by the other worker."""
    items.sort(key=lambda item: not item.nodeid.startswith(("tests/kernels/test_triton_interpreter", "tests/gpu")))
