"""A traced graph as readable Python, the user's source lines as comments, kvpass' regions fenced; diffs of sites."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import example, source_line
from kvpass.graph.module_names import module_path
from kvpass.sites.site import Site

_INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.pow: "**",
    operator.matmul: "@",
    operator.and_: "&",
    operator.or_: "|",
    operator.xor: "^",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.eq: "==",
    operator.ne: "!=",
}
_PREFIX = {operator.neg: "-", operator.pos: "+", operator.invert: "~"}
_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c", "bool": "b"}
CONTEXT = 3
"""Unchanged lines shown around a change in a diff."""


class _Name:
    """Prints as a bare name inside the repr of any nested argument."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def describe(value: Any) -> str:
    """Short type of a fake value: `f32[2, 4, s0, 64]`, `Sym(s0)`; '' if there is none."""
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        stem = name.rstrip("0123456789")
        short = _DTYPES.get(stem, stem) + (name[len(stem) :] or ("8" if stem == "bool" else ""))
        return f"{short}[{', '.join(map(str, value.shape))}]"
    return f"Sym({value})" if isinstance(value, torch.SymInt) else ""


def statement(node: fx.Node) -> str:
    """The assignment that a node stands for."""
    kind = describe(example(node))
    return f'{node.name}: "{kind}" = {_expression(node)}' if kind else f"{node.name} = {_expression(node)}"


def readable(gm: fx.GraphModule, title: str) -> str:
    """The whole graph as one Python function.

    Args:
        gm: any traced graph.
        title: first words of the file.
    """
    nodes = list(gm.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    lines = [
        f"# kvpass: {title}; {len(nodes)} nodes, {len(inputs)} inputs.",
        "# One line a node; comments name the module and the line of the model that made it.",
        "import torch",
        "from torch import device, inf, nan",
        "",
        "",
        "def forward(",
        "    self,",
        *(f"    {_parameter(n)}" for n in inputs),
        "):",
    ]
    return "\n".join([*lines, *_body(n for n in nodes if n.op != "placeholder")]) + "\n"


def site_diff(captured: fx.GraphModule, rewritten: fx.GraphModule, site: Site) -> str:
    """Unified diff of the stretch of the graph in which a site lives, before and after, then the site's new inputs."""
    gone = site.nodes
    before = _stretch(captured.graph, lambda n: n in gone, CONTEXT)
    names = {n.name for n in before}
    after = _stretch(rewritten.graph, lambda n: n.name in names or _layer_of(n) == site.layer, 0)
    old, new = (list(_body(part, "", brief=True)) for part in (before, after))
    place = f"{site.name} ({site.phase.value})"
    diff = difflib.unified_diff(old, new, f"captured: {place}", f"rewritten: {place}", n=CONTEXT, lineterm="")
    state = [n for n in rewritten.graph.nodes if n.op == "placeholder" and _layer_of(n) == site.layer]
    return "\n".join([f"# {site.source}", *diff, "# new inputs:", *(f"+{_parameter(n)}" for n in state)]) + "\n"


def _stretch(graph: fx.Graph, belongs: Callable[[fx.Node], bool], context: int) -> list[fx.Node]:
    """Nodes from the first to the last that belong, with some context; inputs and output left out."""
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    at = [i for i, n in enumerate(nodes) if belongs(n)]
    return nodes[max(0, min(at) - context) : max(at) + context + 1] if at else []


def _site_of(node: fx.Node) -> str | None:
    site = node.meta.get("kvpass", {}).get("site")
    return str(site) if site is not None else None


def _layer_of(node: fx.Node) -> int | None:
    layer: int | None = node.meta.get("kvpass", {}).get("layer")
    return layer


def _parameter(node: fx.Node) -> str:
    kind, site = describe(example(node)), _site_of(node)
    text = f'{node.name}: "{kind}",' if kind else f"{node.name},"
    return text if site is None else f"{text}  # kvpass: state of {site}, {node.meta['kvpass']['state']}"


def _body(nodes: Iterable[fx.Node], indent: str = "    ", brief: bool = False) -> Iterator[str]:
    """Statements, comments with source lines, fences around what kvpass made. Brief: no fences, short comments."""
    place, inside = "", False
    for node in nodes:
        ours = "kvpass" in node.meta
        if ours is not inside and not brief:
            yield indent + (f"# >>> kvpass {_site_of(node) or 'shell'} >>>" if ours else "# <<< kvpass <<<")
            place = ""
        inside = ours
        here = _place(node, brief)
        if here and here != place:
            yield f"{indent}# {here}"
        place = here or place
        yield indent + (f"return {_text(node.args[0])}" if node.op == "output" else statement(node))


def _place(node: fx.Node, brief: bool) -> str:
    line = source_line(node).replace("\n", " ")
    if brief:
        return line.partition(": ")[0].rpartition("/")[2]
    return " | ".join(part for part in (module_path(node), line) if part)


def _expression(node: fx.Node) -> str:
    args, kwargs = node.args, node.kwargs
    if node.op == "get_attr":
        return f"self.{node.target}"
    if node.op == "call_function":
        return _operator(node) or _call(_target_name(node.target), args, kwargs)
    if node.op == "call_method":
        return _call(f"{_text(args[0])}.{node.target}", args[1:], kwargs)
    return _call(f"self.{node.target}", args, kwargs)


def _operator(node: fx.Node) -> str:
    """Infix, prefix, index or attribute form of a call; '' if it has none."""
    target, args = node.target, node.args
    if target in _INFIX and len(args) == 2:
        return f"{_text(args[0])} {_INFIX[target]} {_text(args[1])}"
    if target in _PREFIX:
        return f"{_PREFIX[target]}{_text(args[0])}"
    if target is operator.getitem:
        return f"{_text(args[0])}[{_index(args[1])}]"
    if target is operator.setitem:
        return f"operator.setitem({_text(args[0])}, {_text(args[1])}, {_text(args[2])})"
    return f"{_text(args[0])}.{args[1]}" if target is getattr and len(args) == 2 else ""


def _index(at: Any) -> str:
    if isinstance(at, (tuple, list)) and at:
        return ", ".join(map(_index, at)) + ("," if len(at) == 1 else "")
    if isinstance(at, slice):
        parts = ["" if part is None else _text(part) for part in (at.start, at.stop, at.step)]
        return ":".join(parts if at.step is not None else parts[:2])
    return "..." if at is Ellipsis else _text(at)


def _call(name: str, args: Any, kwargs: Any) -> str:
    return f"{name}({', '.join([*map(_text, args), *(f'{key}={_text(value)}' for key, value in kwargs.items())])})"


def _text(arg: Any) -> str:
    # a name is no argument of a node, but these are only printed
    return repr(fx.map_arg(arg, lambda n: _Name(n.name)))  # type: ignore[arg-type, return-value]


def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    module, name = getattr(target, "__module__", "") or "torch", getattr(target, "__name__", str(target))
    module = {"_operator": "operator", "torch.functional": "torch", "torch._VariableFunctions": "torch"}.get(
        module, module
    )
    return name if module == "builtins" else f"{module}.{name}"
