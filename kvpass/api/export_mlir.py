"""`kvpass.export_mlir`: a rewritten program through torch-mlir, as a file in the torch or the linalg dialect."""

from __future__ import annotations

import re
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvpass.api.rewrite import Rewritten
from kvpass.errors import KVPassError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

DIALECTS = {"torch": "torch", "linalg": "linalg-on-tensors"}
OPS = ("inline", "custom")
_TO_TORCH = "builtin.module(torchdynamo-export-to-torch-backend-pipeline)"
_TO_LINALG = "builtin.module(torch-backend-to-linalg-on-tensors-backend-pipeline)"
_ONLY_LINALG = "torch-verify-linalg-on-tensors-backend-contract"


def export_mlir(
    program: Rewritten | ExportedProgram, path: str | Path, *, dialect: str = "torch", ops: str = "inline"
) -> str:
    """Write a rewritten program as MLIR and return the text. Weights are in it, so the file is as large as the model.

    Args:
        program: of `kvpass.rewrite`, or its `.program`.
        path: of the file that is written.
        dialect: `torch`, or `linalg` (linalg on tensors with arith, math and tensor).
        ops: `inline`: each kvpass op as its plain torch decomposition, so that nothing of kvpass is left. `custom`:
            kept by name, in torch as `torch.operator "torch.kvpass.decode_step"`, in linalg as a call of a private
            function `@kvpass.decode_step_N` without a body, whose attributes say rule, scale and softcap.

    Raises:
        ValueError: unknown `dialect` or `ops`.
        KVPassError: torch-mlir is not installed, or cannot lower the program.
    """
    if dialect not in DIALECTS or ops not in OPS:
        raise ValueError(f"dialect is one of {', '.join(DIALECTS)}, ops one of {', '.join(OPS)}: {dialect!r}, {ops!r}")
    fx = _torch_mlir()
    refused = import_module("torch_mlir.compiler_utils").TorchMlirCompilerError
    step = program.program if isinstance(program, Rewritten) else program
    convert = _inline if ops == "inline" else _custom
    try:
        text = str(convert(fx, step, dialect))
    except (refused, NotImplementedError) as error:
        raise KVPassError(
            f"torch-mlir cannot lower the program: {str(error).strip().splitlines()[0]}",
            where=f"dialect {dialect}, ops {ops}",
            hint="the model's own ops may be the reason: try the original program with torch_mlir.fx.export_and_import",
        ) from error
    Path(path).write_text(text)
    return text


def _torch_mlir() -> Any:
    try:
        return import_module("torch_mlir.fx")
    except ImportError as error:
        raise KVPassError(
            "torch-mlir is not installed",
            hint="pip install --no-deps torch-mlir (its dependencies may replace torch)",
        ) from error


def _inline(fx: Any, program: ExportedProgram, dialect: str) -> Any:
    from kvpass.lowering.pure import decompositions

    return fx.export_and_import(
        _decomposed(fx, program, decompositions()), output_type=DIALECTS[dialect], decomposition_table={}
    )


def _custom(fx: Any, program: ExportedProgram, dialect: str) -> Any:
    """torch-mlir's own pipelines accept no operator that they do not know, but calls of functions without a body."""
    module = fx.export_and_import(_decomposed(fx, program, {}), output_type="raw", decomposition_table={})
    if dialect == "torch":
        _run(module, "builtin.module(func.func(canonicalize,cse))")
        return module
    _as_calls(module)
    _run(module, _TO_TORCH)
    _run(module, _TO_LINALG, without=_ONLY_LINALG)
    return module


def _decomposed(fx: Any, program: ExportedProgram, ours: dict[Any, Any]) -> ExportedProgram:
    """In ops that torch-mlir knows. It knows no strides that depend on a size: an empty tensor needs none."""
    from kvpass.lowering.exported import any_size

    with any_size(), warnings.catch_warnings():
        # torch copies tree specs in a way that it has itself deprecated
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        result: ExportedProgram = program.run_decompositions({**fx.get_decomposition_table(), **ours})
    graph = result.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.empty_strided.default):
        with graph.inserting_before(node):
            dense = graph.call_function(torch.ops.aten.empty.memory_format, node.args[:1], node.kwargs)
        dense.meta = node.meta
        node.replace_all_uses_with(dense)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    return result


def _run(module: Any, pipeline: str, without: str = "") -> None:
    """Run a pipeline in place, spelled out and without the named pass."""
    with module.context:
        passes = str(import_module("torch_mlir.passmanager").PassManager.parse(pipeline))
    if without:
        passes = re.sub(rf",{without}(\{{[^}}]*\}})?", "", passes)
    run = import_module("torch_mlir.compiler_utils").run_pipeline_with_repro_report
    run(module, passes, "Lowering a program with kvpass ops")


def _as_calls(module: Any) -> None:
    """Each kvpass operator as a call of a private function of its tensors and numbers that change."""
    ir, func = import_module("torch_mlir.ir"), import_module("torch_mlir.dialects.func")
    with module.context, ir.Location.unknown():
        for number, op in enumerate(_operators(ir, module)):
            changing, fixed = _operands(op)
            name, results = f"kvpass.decode_step_{number}", [r.type for r in op.results]
            kind = ir.FunctionType.get([operand.type for operand in changing.values()], results)
            declared = func.FuncOp(name, kind, visibility="private", ip=ir.InsertionPoint(module.body))
            for key, value in fixed.items():
                declared.attributes[f"kvpass_{key}"] = value
            names = [ir.StringAttr.get(key) for key in changing]
            declared.attributes["kvpass_arguments"] = ir.ArrayAttr.get(names)
            callee = ir.FlatSymbolRefAttr.get(name)
            call = func.CallOp(results, callee, list(changing.values()), ip=ir.InsertionPoint(op))
            for old, new in zip(op.results, call.results, strict=True):
                old.replace_all_uses_with(new)
            op.erase()


def _operators(ir: Any, module: Any) -> list[Any]:
    found: list[Any] = []

    def visit(op: Any) -> Any:
        if op.name == "torch.operator" and "kvpass." in str(op.attributes["name"]):
            found.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return found


def _operands(op: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Operands of an operator by name: those that change from call to call, and the constants' attributes."""
    from kvpass.lowering.pure import step_op

    names = [argument.name for argument in step_op(len(op.results) - 1)._schema.arguments]
    changing, fixed = {}, {}
    for name, operand in zip(names, op.operands, strict=True):
        kind = str(operand.type)
        if kind in ("!torch.str", "!torch.float"):
            fixed[name] = operand.owner.attributes["value"]
        elif kind != "!torch.none":
            changing[name] = operand
    return changing, fixed
