"""Memory keys and values: learned ones that stand in front of the cache's for every query, and are not cached.

    k, v = cat([memory_k, k_cached], T), cat([memory_v, v_cached], T)

(x-transformers' `attn_num_mem_kv`, persistent memory, the null keys of lucidrains' decoders.) The attention becomes one
over the cache, with a memory beside it.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from kvpass.graph.calls import argument, call_name, example, is_input, is_metadata
from kvpass.graph.shapes import normal_dim, shape_of
from kvpass.graph.views import walk_up
from kvpass.sites.site import Core, Joined, Memory

LIMIT = 40
"""Nodes between a memory and its parameters."""


class MemoryKeys:
    name = "memory"

    def match(self, core: Core) -> Core | None:
        """The same attention with its memory named; None if it has none."""
        keys, values = _joined(core.k), _joined(core.v)
        if keys is None or values is None:
            return None
        counts = {shape_of(joined.memory)[joined.axis] for joined in (keys, values)}
        return replace(core, memory=Memory(keys, values, counts.pop())) if len(counts) == 1 else None


def _joined(node: fx.Node) -> Joined | None:
    base, views = walk_up(node, lambda n: False)
    parts = [*argument(base, 0, "tensors")] if call_name(base) == "cat" else []
    if len(parts) != 2 or any(user.op == "output" for user in base.users):
        return None  # what is returned is the cache, a memory in front of it or not
    memory, cached = parts
    axis = normal_dim(argument(base, 1, "dim", 0), len(shape_of(base)))
    alike = len({(example(part).dtype, example(part).dim()) for part in (base, memory, cached)}) == 1
    if not alike or not _is_learned(memory):
        return None
    count = shape_of(memory)[axis]
    if not isinstance(count, int) or count == 0:  # a past of no tokens
        return None
    return Joined(base, axis, memory, cached, views)


def _is_learned(node: fx.Node) -> bool:
    """Made of parameters and of sizes alone: neither of tokens, nor of what is cached."""
    queue, seen = [node], {node}
    for current in queue:
        if is_input(current):
            return False
        if not is_metadata(current):
            fresh = [n for n in current.all_input_nodes if n not in seen]
            seen.update(fresh)
            queue += fresh
        if len(queue) > LIMIT:
            return False
    return True
