"""Linalg on tensors, as text, through LLVM and run: what an MLIR backend would make of an exported program."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch_mlir import ir
from torch_mlir.execution_engine import ExecutionEngine
from torch_mlir.passmanager import PassManager
from torch_mlir.runtime import get_ranked_memref_descriptor as descriptor
from torch_mlir.runtime import ranked_memref_to_numpy

PASSES = """
one-shot-bufferize{bufferize-function-boundaries=true copy-before-write=true
function-boundary-type-conversion=identity-layout-map},
func.func(refback-munge-memref-copy,convert-linalg-to-loops),
expand-strided-metadata,lower-affine,convert-scf-to-cf,convert-math-to-llvm,convert-math-to-libm,
convert-arith-to-llvm,convert-index-to-llvm,finalize-memref-to-llvm,convert-func-to-llvm,convert-cf-to-llvm,
reconcile-unrealized-casts
"""


class Compiled:
    """The function `main` of a module: tensors and ints in, tensors out."""

    def __init__(self, text: str) -> None:
        with ir.Context():
            module = ir.Module.parse(text)
            for op in module.body.operations:
                op.attributes["llvm.emit_c_interface"] = ir.UnitAttr.get()
            PassManager.parse(f"builtin.module({' '.join(PASSES.split())})").run(module.operation)
            self.engine = ExecutionEngine(module, opt_level=0)

    def __call__(self, args: Any, like: Any) -> list[torch.Tensor]:
        """like: tensors of the results' ranks and dtypes."""
        empty = [descriptor(np.zeros([1] * t.dim(), dtype=t.detach().numpy().dtype)) for t in like]
        fields = [(f"result{at}", type(one)) for at, one in enumerate(empty)]
        results = type("Results", (ctypes.Structure,), {"_fields_": fields})()
        plain = [arg if isinstance(arg, int) else np.ascontiguousarray(arg.detach().numpy()) for arg in args]
        packed = [ctypes.pointer(ctypes.pointer(results)), *map(self._packed, plain)]
        self.engine.invoke("main", *packed)  # a descriptor is an address: `plain` keeps what it points to
        views = (ranked_memref_to_numpy(ctypes.pointer(getattr(results, name))) for name, _ in fields)
        return [torch.from_numpy(view.copy()) for view in views]

    def _packed(self, arg: Any) -> Any:
        if isinstance(arg, int):
            return ctypes.pointer(ctypes.c_int64(arg))
        return ctypes.pointer(ctypes.pointer(descriptor(arg)))
