"""kvpass: a torch.compile backend that finds attention and its KV cache in any traced model and makes it evict for
real.

model = kvpass.compile(model, policy="h2o", budget=0.2)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "KVPassError": "errors",
    "Policy": "policy.spec",
    "Reason": "errors",
    "Seen": "kernels.scorers.seen",
    "backend": "compiler",
    "compile": "compiled",
    "explain": "explaining",
    "export_mlir": "mlir",
    "inspect": "reporting",
    "marked": "runtime.marks",
    "report": "reporting",
    "rewrite": "rewriting",
    "scorer": "kernels.scorers.registry",
}

__all__ = [
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
    "marked",
    "report",
    "rewrite",
    "scorer",
]

if TYPE_CHECKING:
    from kvpass.compiled import compile
    from kvpass.compiler import backend
    from kvpass.errors import KVPassError, Reason
    from kvpass.explaining import explain
    from kvpass.kernels.scorers.registry import scorer
    from kvpass.kernels.scorers.seen import Seen
    from kvpass.mlir import export_mlir
    from kvpass.policy.spec import Policy
    from kvpass.reporting import inspect, report
    from kvpass.rewriting import rewrite
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
