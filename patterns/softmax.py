"""Core: attention written out: product of queries and keys, softmax over the keys, product with the values.

Between product and softmax, in any order: scale, masks (added, `where`, `masked_fill`), softcap, casts, sink logits;
between softmax and the values: casts, dropout at 0, the sinks' column cut off, the same mask again, views; behind the
values: a gate that stands for sinks (`patterns/sinks.py`). Products may be matmul, bmm, baddbmm or einsum. Refuses:
dropout in training, probabilities that anything else reads, logits changed by something that is not in the list.
"""

from __future__ import annotations

from kvpass.patterns.chosen import split_choices
from kvpass.patterns.logits import FILLS, SAME, Logits, first_product, is_cast_of_numbers, leads, read_logits
from kvpass.patterns.near import why_no_core
from kvpass.patterns.sinks import gated, sink_logits
from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import argument, call_name, is_metadata, operand
from kvpass.graph.miss import Miss
from kvpass.graph.numbers import number
from kvpass.graph.product import SPACES, Product, values_product
from kvpass.graph.shapes import normal_dim, same, shape_of
from kvpass.sites.site import Axes, Core
from kvpass.terms import MaskKind


class SoftmaxCore:
    name = "softmax"
    anchors = frozenset({"softmax"})
    why_not = staticmethod(why_no_core)

    def match(self, node: fx.Node) -> Core | None:
        """The core around a softmax, in normal form.

        Raises:
            Miss: UNSUPPORTED_ATTENTION, DROPOUT, MASK_SHAPE or MASK_UNKNOWN.
        """
        if call_name(node) not in ("softmax", "_softmax") or len(shape_of(node)) not in SPACES:
            return None
        if not _over_keys(node) or not leads(operand(node)):
            return None
        try:
            above = read_logits(operand(node), node)
            return self._core(node, above, *_values(node, above))
        except Miss as miss:
            product = first_product(operand(node))
            miss.reads += (product.right,) if product is not None else ()
            raise

    def _core(self, node: fx.Node, above: Logits, below: list[fx.Node], values: Product) -> Core:
        logits = above.product
        assert logits is not None
        if above.softcap < 0:
            raise Miss(Reason.UNSUPPORTED_ATTENTION, node, f"a softcap of {above.softcap}")
        (q_axes, k_axes, _), (_, v_axes, out_axes) = logits.axes, values.axes
        core = Core(
            node=values.node,
            q=logits.left,
            k=logits.right,
            v=values.right,
            terms=split_choices(tuple(above.terms)),
            scale=above.factor * (above.softcap or 1.0),
            causal=False,
            pattern=self.name,
            axes=Axes(q_axes, k_axes, v_axes, out_axes),
            softcap=above.softcap,
            sinks=sink_logits(above.sinks) if above.sinks is not None else None,
            inner=(*reversed(above.nodes), node, *below),
        )
        return gated(core, node)


_ASKED_FOR = (
    "call without output_attentions=True: an evicting cache has no weights of tokens that are gone; "
    "kvpass.inspect(cache) shows what is kept, and how it scores"
)


def _over_keys(node: fx.Node) -> bool:
    dim = argument(node, 1, "dim")
    rank = len(shape_of(node))
    return isinstance(dim, int) and normal_dim(dim, rank) == rank - 1


def _values(node: fx.Node, above: Logits) -> tuple[list[fx.Node], Product]:
    """Down from the softmax to the product with the values."""
    assert above.product is not None
    space = above.product.axes[2] if len(above.product.axes[2]) == len(shape_of(node)) else SPACES[len(shape_of(node))]
    passed: list[fx.Node] = []
    current, sinks = node, above.sinks is not None
    while True:
        readers = [user for user in current.users if not is_metadata(user)]
        if len(readers) > 1 and any(reader.op == "output" for reader in readers):
            what = "the attention weights are asked for: the probabilities are returned too"
            raise Miss(Reason.UNSUPPORTED_ATTENTION, current, what, hint=_ASKED_FOR)
        if len(readers) != 1:
            names = ", ".join(user.name for user in readers)
            raise Miss(Reason.UNSUPPORTED_ATTENTION, current, f"the probabilities feed {names or 'nothing'}")
        reader = readers[0]
        product = values_product(reader, space)
        if product is not None and product.left is current:
            if sinks:
                raise Miss(Reason.UNSUPPORTED_ATTENTION, reader, "the sinks' column is not cut off")
            return passed, product
        if sinks and _cuts_last(reader):
            sinks = False
        else:
            space = space if _hides_again(reader, current, above) else _passed(reader, current, space)
        passed.append(reader)
        current = reader


def _hides_again(node: fx.Node, before: fx.Node, above: Logits) -> bool:
    """`probs.masked_fill(mask, 0.0)`, `where(seen, probs, 0.0)` by a mask that hid the logits: nothing is left there,
    but in rows that see nothing at all, which get zeros here too.
    """
    name = call_name(node)
    if name in FILLS and operand(node) is before:
        kind, mask, fill = MaskKind.HIDE, argument(node, 1, "mask"), argument(node, 2, "value")
    elif name == "where" and argument(node, 1, "input") is before:
        kind, mask, fill = MaskKind.KEEP, argument(node, 0, "condition"), argument(node, 2, "other")
    else:
        return False
    return number(fill) == 0.0 and any(term.kind is kind and term.node is mask for term in above.terms)


def _passed(node: fx.Node, before: fx.Node, space: str) -> str:
    """Axes of the probabilities after an operation that leaves them as they are.

    Raises:
        Miss: it does not.
    """
    name = call_name(node)
    if name == "dropout":
        p, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", argument(node, 2, "train", True))
        if p != 0 and training is not False:
            raise Miss(Reason.DROPOUT, node, f"dropout with p={p} on the probabilities")
        return space
    if name in SAME | {"nan_to_num"} and operand(node) is before and is_cast_of_numbers(node):
        return space
    if name == "reshape" and operand(node) is before:
        old, new = shape_of(before), shape_of(node)
        if len(old) == len(new) and all(same(a, b) for a, b in zip(old, new, strict=True)):
            return space
        kept = len(new) in SPACES and all(same(a, b) for a, b in zip(old[-2:], new[-2:], strict=True))
        if kept and space in SPACES.values():
            return SPACES[len(new)]
    raise Miss(Reason.UNSUPPORTED_ATTENTION, node, f"the probabilities go through {name or node.op}")


def _cuts_last(node: fx.Node) -> bool:
    """`probs[..., :-1]`, or a slice that is one shorter."""
    if call_name(node) not in ("getitem", "slice", "narrow") or not isinstance(operand(node), fx.Node):
        return False
    if call_name(node) == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        last = index[-1]
        whole = all(item is Ellipsis or item == slice(None, None, None) for item in index[:-1])
        starts = isinstance(last, slice) and last.start in (None, 0) and last.step in (None, 1)
        full = Ellipsis in index[:-1] or len(index) == len(shape_of(node))
        if not (whole and starts and full):
            return False
    elif call_name(node) == "slice":
        dim, start = argument(node, 1, "dim", 0), argument(node, 2, "start", 0)
        if normal_dim(dim, len(shape_of(node))) != len(shape_of(node)) - 1 or start not in (None, 0):
            return False
    elif normal_dim(argument(node, 1, "dim"), len(shape_of(node))) != len(shape_of(node)) - 1:
        return False
    before, after = shape_of(operand(node)), shape_of(node)
    return len(before) == len(after) and same(before[-1], after[-1] + 1)
