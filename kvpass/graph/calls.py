"""One name per operation, however it is spelled: function, method, builtin, nn function or aten op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import fx

_ATEN_CORES = (
    "flash_attention_for_cpu",
    "flash_attention",
    "efficient_attention",
    "cudnn_attention",
    "fused_attention_overrideable",
)

_OPERATORS = (
    *("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"),
    *("neg", "abs", "invert", "xor", "lshift", "rshift", "getitem", "setitem"),
    *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "rsub"),
)
"""Python's operators, which some torches trace as methods: `a == b` is `a.__eq__(b)` in 2.11. Those with their sides
exchanged are left out, but `rsub`, which torch has too.
"""

_SAME = {
    **{f"__{name}__": name for name in _OPERATORS},
    "__and__": "and_",
    "__or__": "or_",
    "scaled_dot_product_attention": "sdpa",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "view": "reshape",
    "view_as": "reshape",
    "reshape_as": "reshape",
    "flatten": "reshape",
    "unflatten": "reshape",
    "expand_as": "expand",
    "broadcast_to": "expand",
    "tile": "repeat",
    "_unsafe_view": "reshape",
    "_to_copy": "to",
    "lift_fresh_copy": "clone",
    "_softmax": "softmax",
    "_safe_softmax": "softmax",
    **dict.fromkeys((f"_scaled_dot_product_{kind}" for kind in _ATEN_CORES), "sdpa_aten"),
}

_NOT_IN_PLACE = frozenset({"and_", "or_", "not_", "is_"})
"""The operators of Python: new tensors in spite of their names."""

_IN_PLACE = frozenset(
    {"setitem", "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"}
)

PROJECTIONS = frozenset({"linear", "matmul", "addmm", "mm", "bmm", "einsum", "conv1d"})

METADATA = frozenset(
    {
        "size",
        "numel",
        "dim",
        "nelement",
        "ndimension",
        "sym_size",
        "sym_numel",
        "sym_stride",
        "_assert_tensor_metadata",
        "is_contiguous",
        "stride",
        "get_device",
        "element_size",
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
    }
)
_METADATA_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout"})


def call_name(node: fx.Node) -> str:
    """Canonical name of what a node calls: `cat`, `sdpa`, `reshape`, `transpose`, ...; '' for nodes that call
    nothing.
    """
    if node.op == "call_method":
        name = str(node.target)
    elif isinstance(node.target, torch._ops.OpOverload):
        name = node.target.overloadpacket.__name__
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
    else:
        return ""
    return _SAME.get(name, name)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of a call by position or keyword; `default` if it is not given."""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def operand(node: fx.Node) -> Any:
    """The tensor that a function or method works on: its first argument, also when it is given by keyword."""
    return argument(node, 0, "input")


def called(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call gives for other arguments."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def is_metadata(node: fx.Node) -> bool:
    """True if the node reads only sizes, strides, dtype or device of its tensor, so a shell can answer it."""
    if node.op not in ("call_method", "call_function"):
        return False
    if call_name(node) == "getattr":
        return node.args[1] in _METADATA_ATTRIBUTES
    return call_name(node) in METADATA


def unused_sizes(node: fx.Node, gone: Set[fx.Node] = frozenset()) -> list[fx.Node]:
    """Reads of a node's sizes whose numbers nobody but `gone` uses, with what is taken out of them: users first."""
    found: list[fx.Node] = []
    for user in node.users:
        if user not in gone and (is_metadata(user) or (is_metadata(node) and call_name(user) == "getitem")):
            below = unused_sizes(user, gone)
            found += [*below, user] if set(user.users) <= {*below, *gone} else []
    return found


def example(node: fx.Node) -> Any:
    """The fake tensor (or SymInt) that the tracer stored for a node, or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def changes(node: fx.Node) -> bool:
    """True if the node changes its first argument in place."""
    name = call_name(node)
    in_place = name.endswith("_") and not name.endswith("__") and name not in _NOT_IN_PLACE
    return name in _IN_PLACE or in_place


def is_input(node: fx.Node) -> bool:
    """An input of the call that holds data, so no weight."""
    value = example(node)
    return node.op == "placeholder" and isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)


def source_line(node: fx.Node) -> str:
    """`file.py:123 in forward: code` of the user's line that made the node; '' if the trace has none."""
    frames = str(node.meta.get("stack_trace") or "").strip().splitlines()
    for at in range(len(frames) - 1, -1, -1):
        line = frames[at].strip()
        if line.startswith("File "):
            path, number, function = (part.strip() for part in line[5:].split(",", 2))
            code = frames[at + 1].strip() if at + 1 < len(frames) else ""
            return f"{path.strip(chr(34))}:{number.removeprefix('line ')} {function}: {code}"
    return ""
