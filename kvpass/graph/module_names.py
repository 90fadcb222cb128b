"""The path of the module that made a node, without the way by which Dynamo found the model."""

from __future__ import annotations

import re

from torch import fx

_ATTRIBUTE_CALL = re.compile(r"getattr\(((?:[^()]|\([^()]*\))*), '([^']*)'\)")
_TOKEN = re.compile(r"\['((?:[^'\\]|\\.)*)'\]|\[\"((?:[^\"\\]|\\.)*)\"\]|\[(-?\d+)\]|([^.\[\]]+)")
_FRAMES = ("L", "G")
_CONTENTS = ("_modules", "__dict__")


def module_path(node: fx.Node) -> str:
    """Path of the innermost nn.Module that made the node (`model.layers.0.self_attn`), '' if unknown or the outermost
    module itself."""
    stack = node.meta.get("nn_module_stack")
    return named_path(str(next(reversed(stack.values()))[0])) if stack else ""


def named_path(source: str) -> str:
    """A path of Dynamo's (`L['self'].model.layers.0`) without its root: the local or global variable, what was looked
    up in it (`L['args'][0]`, `G['registry']['small']`), and the attributes of functions that lead to a module
    (`L['fn'].__wrapped__.__self__`, `.__closure__[0].cell_contents`). torch.export writes no root.
    """
    while source != (plain := _ATTRIBUTE_CALL.sub(r"\1.\2", source)):
        source = plain
    tokens = [m.groups() for m in _TOKEN.finditer(source)]
    parts: list[str] = []
    rooted = bool(tokens) and tokens[0][3] in _FRAMES and len(tokens) > 1 and tokens[1][3] is None
    look_up = False  # the key that follows names an attribute
    for single, double, index, attribute in tokens[1:] if rooted else tokens:
        key = single if single is not None else double
        if attribute in _CONTENTS:
            look_up = True
            continue
        if attribute is not None:
            if not _of_functions(attribute):
                parts.append(attribute)
        elif key is not None and (look_up or parts or not rooted):
            parts.append(key)
        elif index is not None and parts:
            parts[-1] += f"[{index}]"
        look_up = False
    return ".".join(parts)


def _of_functions(attribute: str) -> bool:
    return attribute == "cell_contents" or (attribute.startswith("__") and attribute.endswith("__"))
