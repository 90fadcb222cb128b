"""The nodes of one site cut out of a captured graph as a graph of their own: what a rewrite is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kvpass.errors import VerificationError
from kvpass.graph.calls import example
from kvpass.graph.shapes import shape_of
from kvpass.graph.symbols import SizeReader
from kvpass.sites.site import Half, Site
from kvpass.terms import CacheForm, Layout


class Isolated:
    """From the values of a site's borders and its past K and V to the attention's output, through the nodes of the
    captured graph.

    Args:
        original: the captured graph; not modified.
        site: what to cut out.
        args: inputs of one call of the graph, from which sizes take their values.

    Raises:
        VerificationError: the attention depends on some other tensor.
    """

    def __init__(self, original: fx.GraphModule, site: Site, args: Sequence[Any]) -> None:
        self.site, self.args = site, args
        self.sizes = SizeReader([n for n in original.graph.nodes if n.op == "placeholder"])
        self.graph = fx.Graph()
        self.copy: dict[fx.Node, Any] = {}
        self.names: list[str] = []
        for name, nodes in self._borders().items():
            fresh = [node for node in nodes if node is not None and node not in self.copy]
            if fresh:
                self.copy |= dict.fromkeys(fresh, self.graph.placeholder(name))
                self.names.append(name)
        self.graph.output(self._take(site.core.node))
        self.gm = fx.GraphModule(original, self.graph)

    def __call__(self, values: dict[str, Tensor], past: tuple[Tensor, Tensor]) -> Tensor:
        """The unmodified attention, [B, Hq, S, Dv].

        Args:
            values: of `wanted`, by name of the captured node, as the graph computes them.
            past: K and V, `[B, Hkv, ., D]`.
        """
        halves = self.site.key, self.site.value
        given = {name: values[node.name] for name, node in self.wanted.items()}
        cached = _as_cached(past, halves)
        for at, (dense, half) in enumerate(zip(cached, halves, strict=True)):
            given[f"past_{at}"] = dense
            if half.update.form is CacheForm.BUFFER:
                given[f"buffer_{at}"] = self._filled(half, dense, given[f"new_{at}"])
        result: Tensor = self.gm(*(given[name] for name in self.names))
        return _heads_first(result, self.site)

    @property
    def wanted(self) -> dict[str, fx.Node]:
        """Nodes of the captured graph whose values a call needs."""
        key, value, core = self.site.key.update, self.site.value.update, self.site.core
        found = {"q": core.q, "new_0": key.new, "new_1": value.new}
        found |= {f"mask_{at}": term.node for at, term in enumerate(core.terms)}
        if core.memory is not None:
            found |= {"memory_0": core.memory.k.memory, "memory_1": core.memory.v.memory}
        return found if core.sinks is None else {**found, "sinks": core.sinks}

    def _borders(self) -> dict[str, tuple[fx.Node | None, ...]]:
        found: dict[str, tuple[fx.Node | None, ...]] = {name: (node,) for name, node in self.wanted.items()}
        for at, half in enumerate((self.site.key, self.site.value)):
            update = half.update
            buffered = update.form is CacheForm.BUFFER
            found |= {f"buffer_{at}": (update.node, update.write)} if buffered else {f"past_{at}": (update.past,)}
        return found

    def _filled(self, half: Half, past: Tensor, new: Tensor) -> Tensor:
        """A buffer of the captured length with the past and the new tokens in it."""
        axis = half.layout.token_axis
        dense = torch.cat([past, new], axis)
        sizes = list(dense.shape)
        sizes[axis] = self._number(shape_of(half.update.node)[axis])
        buffer = dense.new_zeros(sizes)
        buffer.narrow(axis, 0, dense.shape[axis]).copy_(dense)
        return buffer

    def _take(self, node: fx.Node) -> Any:
        """The copy of a node and of all it needs; sizes become the numbers that they are in this call."""
        if node not in self.copy:
            value = example(node)
            fixed = isinstance(value, (int, float, torch.SymInt, torch.Size))
            self.copy[node] = self._number(value) if fixed else self._copied(node)
        return self.copy[node]

    def _copied(self, node: fx.Node) -> fx.Node:
        if node.op == "placeholder":
            raise VerificationError(
                f"verify=True cannot isolate this site: its attention also reads the input {node.name}",
                where=f"{self.site.name}, {self.site.source}",
                hint="compile without verify=True, and please report it with the folder of debug=True",
            )
        for needed in node.all_input_nodes:
            self._take(needed)
        return self.graph.node_copy(node, lambda n: self.copy[n])

    def _number(self, value: Any) -> Any:
        if isinstance(value, torch.Size):
            return tuple(self._number(size) for size in value)
        return self.sizes.read(value)(self.args) if isinstance(value, torch.SymInt) else value


def _as_cached(past: tuple[Tensor, Tensor], halves: tuple[Half, Half]) -> list[Tensor]:
    """K and V, `[B, Hkv, T, D]`, as the host caches them; where both lie in one tensor, that one twice."""
    found: dict[fx.Node, Tensor] = {}
    for t, half in zip(past, halves, strict=True):
        layout = half.layout
        if layout.piece is None:
            found[half.update.node] = t if layout == Layout.BHTD else t.transpose(1, 2)
            continue
        letters = {"B": t.shape[0], "T": t.shape[2]}
        sizes = [letters[axis] if isinstance(axis, str) else axis for axis in layout.axes]
        whole = found.setdefault(half.update.node, t.new_zeros(sizes))
        places = torch.arange(whole.numel(), device=t.device).view(sizes)
        for name, *args in layout.to_heads_first:
            places = getattr(places, name)(*args)
        whole.view(-1)[places.reshape(-1)] = t.reshape(-1)
    return [found[half.update.node] for half in halves]


def _heads_first(out: Tensor, site: Site) -> Tensor:
    """A core's output in its own axes as [B, Hq, S, Dv]."""
    axes = site.core.axes.out
    out = out.permute([axes.index(letter) for letter in "NBHGSD" if letter in axes])
    if "N" in axes:
        out = out.unflatten(0, (-1, int(site.dims["Hq"])))
    return out.flatten(1, 2) if "G" in axes else out
