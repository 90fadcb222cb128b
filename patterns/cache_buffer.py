"""Update: new tokens written into a preallocated buffer: HF StaticCache, module buffers, tensors that the caller owns.

`index_copy_`, `buf[:, :, pos] = k`, `buf[:, start:end] = k`, `buf.narrow(..).copy_(k)`, `slice_scatter`, `scatter_`,
`index_put_`, in place or not. The buffer is a graph input (or one of several stacked in it), or is allocated in the
graph and returned. Where the tokens go is kept as it stands: an index tensor or a number; the runtime checks that it
continues what the cache has seen.
"""

from __future__ import annotations

from typing import Any

from kvpass.patterns.cache_one_by_one import one_by_one
from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import argument, call_name, changes, example, is_input, operand
from kvpass.graph.dataflow import Flow
from kvpass.graph.indices import by_axis, index_of
from kvpass.graph.miss import Miss
from kvpass.graph.nearby import home_of
from kvpass.graph.shapes import is_one, normal_dim, same, shape_of
from kvpass.graph.views import walk_up
from kvpass.sites.site import Update
from kvpass.terms import CacheForm

ALLOCATIONS = frozenset({"zeros", "new_zeros", "zeros_like", "empty", "new_empty", "empty_like", "full", "new_full",
                         "full_like", "ones", "new_ones", "ones_like"})  # fmt: skip
Where = tuple[fx.Node, int, Any, Any]
"""Buffer, axis, index tensor or first place, new tokens."""


class BufferUpdate:
    name = "buffer"

    def match(self, node: fx.Node, flow: Flow) -> Update | None:
        """The update at a node that writes new tokens into a buffer; None if it is no such write.

        Raises:
            Miss: DTYPE.
        """
        read = _READERS.get(call_name(node))
        found, inner = read(node) if read is not None else None, tuple[fx.Node, ...]()
        if found is None and call_name(node) == "setitem":
            found, inner = one_by_one(node)
        if found is None:
            return None
        buffer, axis, start, new = found
        if not _is_new_tokens(buffer, axis, new):
            return None
        home, path = home_of(buffer)
        in_place = changes(node)
        kept = node in flow.outputs or (in_place and (home in flow.outputs or is_input(home)))
        if kept:
            base = buffer if in_place else node
            past = home if is_input(home) else None
            if past is None and call_name(home) not in ALLOCATIONS:
                return None
            return Update(base, new, past, axis, CacheForm.BUFFER, self.name, node, start, path, inner)
        return None


def _is_new_tokens(buffer: Any, axis: int, new: Any) -> bool:
    rank = len(shape_of(buffer))
    if not isinstance(new, fx.Node) or rank < 3 or len(shape_of(new)) != rank:
        return False
    others = [at for at in range(rank) if at != axis]
    if not all(same(shape_of(buffer)[at], shape_of(new)[at]) for at in others if at):
        return False  # of the first axis, fewer rows may be written than there are
    if example(buffer).dtype != example(new).dtype or not example(buffer).is_floating_point():
        what = f"{example(new).dtype} is written into a buffer of {example(buffer).dtype}"
        miss = Miss(Reason.DTYPE, buffer, what, (new,))
        miss.axis = axis
        raise miss
    return True


def _index_copy(node: fx.Node) -> Where | None:
    dim, index, new = (argument(node, at, name) for at, name in ((1, "dim"), (2, "index"), (3, "source")))
    buffer = operand(node)
    if not isinstance(dim, int) or len(shape_of(index)) != 1:
        return None
    return buffer, normal_dim(dim, len(shape_of(buffer))), index, new


def _scatter(node: fx.Node) -> Where | None:
    dim, index, new = (argument(node, at, name) for at, name in ((1, "dim"), (2, "index"), (3, "src")))
    buffer = operand(node)
    rank = len(shape_of(buffer))
    plain = "reduce" not in node.kwargs and len(node.args) <= 4
    if not plain or not isinstance(dim, int) or len(shape_of(index)) != rank:
        return None
    axis, last = normal_dim(dim, rank), rank - 1
    top, chain = walk_up(index, lambda n: False)
    aligned = [n for n in (top, *chain) if call_name(n) != "expand"]
    along = _wide_axes(aligned[-1], rank) in ([axis], []) or (top is aligned[-1] and axis == last)
    return (buffer, axis, top, new) if along and _wide_axes(top, rank) in ([axis], [], [last]) else None


def _wide_axes(node: fx.Node, rank: int) -> list[int]:
    """Axes that are longer than one, counted as those of a tensor of `rank` that it is broadcast to."""
    sizes = shape_of(node)
    return [rank - len(sizes) + at for at, size in enumerate(sizes) if not is_one(size)]


def _index_put(node: fx.Node) -> Where | None:
    items = argument(node, 1, "indices")
    if argument(node, 3, "accumulate", False) is not False or not isinstance(items, (list, tuple)):
        return None
    return _placed(operand(node), tuple(slice(None) if item is None else item for item in items), node.args[2])


def _setitem(node: fx.Node) -> Where | None:
    return _placed(operand(node), index_of(node), node.args[2])


def _placed(buffer: Any, index: tuple[Any, ...], new: Any) -> Where | None:
    """A write to all of a buffer but one axis; of its first axis it may leave out rows behind those of the call."""
    rank, sizes = len(shape_of(buffer)), shape_of(buffer)
    index = by_axis(index, rank)
    if len(index) != rank:
        return None
    cut = [at for at, item in enumerate(index) if not _whole(item, sizes[at])]
    if len(cut) == 2 and cut[0] == 0:
        if _is_rows(index[0], new):
            cut = cut[1:]
        elif isinstance(index[0], fx.Node):
            return _by_rows(buffer, index, cut[1], new)
    if not cut:  # as many tokens as there is room for
        cut = [at for at, item in enumerate(index) if isinstance(item, slice) and item != slice(None)]
    if len(cut) != 1:
        return None
    item = index[cut[0]]
    if isinstance(item, slice):
        return (buffer, cut[0], item.start or 0, new) if item.step in (None, 1) else None
    return (buffer, cut[0], item, new) if isinstance(item, fx.Node) and len(shape_of(item)) == 1 else None


def _is_rows(item: Any, new: Any) -> bool:
    """`:b` of the first axis, for b sequences."""
    if not isinstance(item, slice) or item.start not in (None, 0) or item.step not in (None, 1):
        return False
    stop = example(item.stop) if isinstance(item.stop, fx.Node) else item.stop
    return isinstance(new, fx.Node) and bool(shape_of(new)) and same(stop, shape_of(new)[0])


def _by_rows(buffer: Any, index: tuple[Any, ...], axis: int, new: Any) -> Where | None:
    """`buffer[rows, :, places] = new`: each row's tokens by an index of their own; all rows, in order."""
    rows, places, sizes = index[0], index[axis], shape_of(buffer)
    top, _ = walk_up(rows, lambda n: False)
    counted = call_name(top) == "arange" and len(top.args) == 1 and same(shape_of(top)[0], sizes[0])
    if not counted or not isinstance(places, fx.Node) or not shape_of(places) or not isinstance(new, fx.Node):
        return None
    wanted = [*sizes]
    if len(shape_of(rows)) == 1 and len(shape_of(places)) == 1:  # one token of each row
        wanted[axis] = 1
        whole = _with_axis(new, wanted)
    elif len(shape_of(rows)) == 2 and is_one(shape_of(rows)[1]) and len(shape_of(places)) in (1, 2):
        wanted[axis] = shape_of(places)[-1]
        whole = new if axis == 1 else _tokens_back(new, wanted)
    else:
        return None
    return None if whole is None else (buffer, axis, places, whole)


def _fits(node: Any, sizes: list[Any]) -> bool:
    have = shape_of(node)
    return len(have) == len(sizes) and all(same(a, b) for a, b in zip(have, sizes, strict=True))


def _with_axis(new: fx.Node, sizes: list[Any]) -> fx.Node | None:
    """What a node is, before an axis of size one was taken from it."""
    above = operand(new)
    takes = call_name(new) in ("getitem", "select", "squeeze", "reshape")
    return above if takes and isinstance(above, fx.Node) and _fits(above, sizes) else None


def _tokens_back(new: fx.Node, sizes: list[Any]) -> fx.Node | None:
    """What a node was, before its tokens were put behind its rows."""
    above = operand(new)
    moved = call_name(new) in ("transpose", "permute") and isinstance(above, fx.Node)
    return above if moved and _fits(above, sizes) and same(shape_of(new)[1], sizes[2]) else None


def _whole(item: Any, size: Any) -> bool:
    """`:` or `:n` of n."""
    if not isinstance(item, slice) or item.start not in (None, 0) or item.step not in (None, 1):
        return False
    stop = example(item.stop) if isinstance(item.stop, fx.Node) else item.stop
    return stop is None or same(stop, size)


def _copied(node: fx.Node) -> Where | None:
    """`buffer[..., a:b].copy_(new)`, `buffer.narrow(axis, a, n).copy_(new)`"""
    part, new = operand(node), argument(node, 1, "src", argument(node, 1, "other"))
    if not isinstance(part, fx.Node):
        return None
    if call_name(part) == "getitem":
        return _placed(operand(part), index_of(part), new)
    if call_name(part) == "narrow":
        axis = normal_dim(argument(part, 1, "dim"), len(shape_of(part)))
        return operand(part), axis, argument(part, 2, "start"), new
    return None


def _slice_scatter(node: fx.Node) -> Where | None:
    new, dim, start = argument(node, 1, "src"), argument(node, 2, "dim", 0), argument(node, 3, "start", 0)
    if argument(node, 5, "step", 1) != 1:
        return None
    return operand(node), normal_dim(dim, len(shape_of(operand(node)))), start or 0, new


_READERS = {
    "index_copy": _index_copy,
    "index_copy_": _index_copy,
    "scatter": _scatter,
    "scatter_": _scatter,
    "index_put": _index_put,
    "index_put_": _index_put,
    "setitem": _setitem,
    "copy_": _copied,
    "slice_scatter": _slice_scatter,
}
