"""kvpass: a torch.compile backend that finds attention and its KV cache in any traced model and makes it evict for
real.

model = kvpass.compile(model, policy="h2o", budget=0.2)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Cache": "api.cache",
    "KVPassError": "errors",
    "Policy": "policy.policy",
    "Reason": "errors",
    "Seen": "kernels.rank.scorers.seen",
    "backend": "pipeline.entry",
    "compile": "api.compile",
    "explain": "api.explain",
    "export_mlir": "api.export_mlir",
    "inspect": "api.live_slots",
    "instructed": "runtime.instruction",
    "marked": "runtime.marks",
    "page": "api.page",
    "replay": "api.replay",
    "report": "api.report",
    "rewrite": "api.rewrite",
    "scorer": "kernels.rank.scorers.registry",
    "tentative": "runtime.drafts",
}

__all__ = [
    "Cache",
    "KVPassError",
    "Policy",
    "Reason",
    "Seen",
    "__version__",
    "backend",
    "compile",
    "explain",
    "export_mlir",
    "inspect",
    "instructed",
    "marked",
    "page",
    "replay",
    "report",
    "rewrite",
    "scorer",
    "tentative",
]

if TYPE_CHECKING:
    from kvpass.api.cache import Cache
    from kvpass.api.compile import compile
    from kvpass.api.explain import explain
    from kvpass.api.export_mlir import export_mlir
    from kvpass.api.live_slots import inspect
    from kvpass.api.page import page
    from kvpass.api.replay import replay
    from kvpass.api.report import report
    from kvpass.api.rewrite import rewrite
    from kvpass.errors import KVPassError, Reason
    from kvpass.kernels.rank.scorers.registry import scorer
    from kvpass.kernels.rank.scorers.seen import Seen
    from kvpass.pipeline.entry import backend
    from kvpass.policy.policy import Policy
    from kvpass.runtime.drafts import tentative
    from kvpass.runtime.instruction import instructed
    from kvpass.runtime.marks import marked


def __getattr__(name: str) -> Any:
    """Resolve public names on first use: importing kvpass costs nothing that is not needed."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kvpass' has no attribute {name!r}")
    value = getattr(import_module(f"kvpass.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
