"""What a site's attention leaves behind in a rewritten graph is taken out: views, cache updates, reads of sizes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from kvpass.errors import VerificationError
from kvpass.graph.calls import call_name, changes, example, is_metadata, operand, unused_sizes
from kvpass.graph.nearby import home_of, taken_out
from kvpass.graph.remains import remains
from kvpass.graph.symbols import SizeReader
from kvpass.sites.site import Half, Update


class Retirement:
    """Takes nodes out of the copy of a graph.

    Attributes:
        copy: the original's nodes -> the copy's.
        inputs: of the original.
        sizes: which inputs have which sizes.
    """

    def __init__(
        self, graph: fx.Graph, copy: dict[fx.Node, fx.Node], inputs: Sequence[fx.Node], sizes: SizeReader
    ) -> None:
        self.graph, self.copy, self.inputs, self.sizes = graph, copy, inputs, sizes
        self._moved: set[fx.Node] = set()

    def sizes_moved(self) -> frozenset[fx.Node]:
        """Nodes of the original that read a size of what is gone, which is read elsewhere now."""
        return frozenset(node for node, ours in self.copy.items() if ours in self._moved)

    def retire_masks(self, nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
        """Take out what was made for proved masks alone: the given nodes of the original, and whatever fed only them.
        Returns these nodes of the original.
        """
        ours, gone = {copied: node for node, copied in self.copy.items()}, set()
        queue = [self.copy[node] for node in nodes]
        while queue:
            node = queue.pop()
            dead = not node._erased and not node.users and node.op != "placeholder"
            if dead and node in ours and not changes(node):
                gone.add(ours[node])
                queue += node.all_input_nodes
                self.graph.erase_node(node)
        return frozenset(gone)

    def retire(self, core: list[fx.Node], *halves: Half) -> None:
        """Erase the core, the views that fed it and the cache updates; metadata reads of a cache go to a shell of its
        shape.
        """
        for node in reversed(core):
            self._erase(node)
        done: set[fx.Node] = set()
        for half in halves:
            for view in reversed(half.chain):
                if not self.copy[view].users and not self.copy[view]._erased:
                    self.graph.erase_node(self.copy[view])
        for half in halves:
            update = half.update
            if update.node in done:
                continue  # keys and values in one tensor
            done.add(update.node)
            if update.write is not None:
                self._unwrite(update)
            elif update.node is not update.new:
                self._drop(self.copy[update.node], half)
                for node in reversed(update.inner):
                    self._erase(self.copy[node])

    def _drop(self, node: fx.Node, half: Half) -> None:
        """Erase a cache; whoever reads its size gets a shell's."""
        self._read_sizes_of(node, self.copy[half.update.new])
        if node.users:
            self._stand_in(node, half)
        self.graph.erase_node(node)

    def _read_sizes_of(self, node: fx.Node, new: fx.Node) -> None:
        """Erase what is made of a cache for its size or type alone, and read the size of the cache or of an input
        instead, and the type of the new keys or values.
        """
        found = remains(node)
        if found is None:
            return
        made, numbers, like = found
        for one in like:
            one.replace_input_with(operand(one), self._like(one, node, new))
        for number in numbers:
            if number.users:
                with self.graph.inserting_before(number):
                    number.replace_all_uses_with(self._number(example(number), node))
        for one in sorted({*made, *numbers}, reverse=True):
            self.graph.erase_node(one)
        self._moved.update(numbers, (one for one in made if is_metadata(one)))

    def _like(self, reader: fx.Node, node: fx.Node, new: fx.Node) -> fx.Node:
        """What `reader` takes its type from, and its sizes if it is a `torch.ones_like`, instead of what is gone."""
        value, sized = example(operand(reader)), call_name(reader).endswith("_like")
        if value.dtype == example(new).dtype and not sized:
            return new
        with self.graph.inserting_before(reader):
            one = self.graph.call_method("new_empty", (new, (1,)), {"dtype": value.dtype})
            one.meta = {"example_value": example(new).new_empty((1,), dtype=value.dtype)}
            if not sized:
                return one
            shell = self.graph.call_method("expand", (one, *(self._number(size, node) for size in value.shape)))
        shell.meta = {"example_value": value}
        return shell

    def _number(self, value: Any, node: fx.Node) -> Any:
        """A size as a node: one of the cache's, if it is one of those."""
        if isinstance(value, int):
            return value
        expr = value.node.expr
        own = [
            axis
            for axis, size in enumerate(example(node).shape)
            if isinstance(size, torch.SymInt) and size.node.expr == expr
        ]
        if not own and expr not in self.sizes.known:
            for size in example(node).shape:  # behind a memory
                more = expr - size.node.expr if isinstance(size, torch.SymInt) else None
                if more is not None and more.is_Integer:
                    return self._sum(self._number(size, node), int(more), value)
            raise VerificationError(
                f"the size {expr} is read of what is made of {node.name}, and of no input",
                hint="please report this with debug=True output; strict=False does not help",
            )
        at: int | None
        axis: int | None
        at, axis = self.sizes.known[expr] if not own else (None, own[0])
        source = node if at is None else self.copy[self.inputs[at]]
        if axis is None:
            return source
        created = self.graph.call_method("size", (source, axis))
        created.meta = {"example_value": value}
        return created

    def _sum(self, size: Any, more: int, value: Any) -> fx.Node:
        created = self.graph.call_function(operator.add, (size, more))
        created.meta = {"example_value": value}
        return created

    def _unwrite(self, update: Update) -> None:
        """Erase a write to a buffer, the slice that it went to, and a buffer that the graph allocated."""
        assert update.write is not None
        write = self.copy[update.write]
        given = operand(update.write)
        into = changes(update.write) or home_of(given)[0] is update.past or home_of(given)[0] is home_of(update.node)[0]
        part = write.args[0] if into else None  # a blend takes something else first
        self._erase(write)
        for inner in reversed(update.inner):
            self._erase(self.copy[inner])
        others = taken_out(update.past, update.path) if update.past is not None else []
        node: Any
        for node in (part, self.copy[update.node], *(self.copy[n] for n in others)):
            while isinstance(node, fx.Node) and node.op != "placeholder" and not node._erased and not _is_read(node):
                above = node.args[0] if node.args else None
                self._erase(node)
                node = above

    def _erase(self, node: fx.Node) -> None:
        """Erase a node that nobody reads any more, with the sizes that were read of it if nobody uses them."""
        for reader in unused_sizes(node):
            self.graph.erase_node(reader)
        if not node.users and not node._erased:
            self.graph.erase_node(node)

    def _stand_in(self, node: fx.Node, half: Half) -> None:
        assert all(is_metadata(user) for user in node.users)
        new = self.copy[half.update.new]
        with self.graph.inserting_before(node):
            sizes = [self.graph.call_method("size", (new, axis)) for axis in range(4)]
            if half.update.past is not None:
                past = self.graph.call_method("size", (self.copy[half.update.past], half.layout.token_axis))
                sizes[half.layout.token_axis] = self.graph.call_function(
                    operator.add, (past, sizes[half.layout.token_axis])
                )
            one = self.graph.call_method("new_empty", (new, (1,)))
            shell = self.graph.call_method("expand", (one, *sizes))
        for created in (*sizes, one, shell):
            created.meta = {"example_value": None, "kvpass": {"shell of": node.name}}
        shell.meta["example_value"] = example(node)
        node.replace_all_uses_with(shell)


def _is_read(node: fx.Node) -> bool:
    """Does anyone read more of a node than its size?"""
    return bool(set(node.users) - set(unused_sizes(node)))
