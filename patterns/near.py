"""Why a softmax is not the softmax of an attention."""

from __future__ import annotations

from kvpass.patterns.logits import LIMIT, first_product, leads
from torch import fx

from kvpass.graph.calls import argument, call_name, operand
from kvpass.graph.product import SPACES
from kvpass.graph.shapes import normal_dim, shape_of


def why_no_core(softmax: fx.Node) -> str:
    """One phrase: how far the way from the softmax up to a product of queries and keys was followed."""
    rank, dim = len(shape_of(softmax)), argument(softmax, 1, "dim")
    if rank not in SPACES:
        return f"over {rank} axes; logits have {min(SPACES)} to {max(SPACES)}"
    if not isinstance(dim, int) or normal_dim(dim, rank) != rank - 1:
        return f"over axis {dim}; the keys must be the last one"
    blocker = _blocker(operand(softmax))
    if blocker is None:
        return "no product of queries and keys above it"
    above = next(n for n in blocker.all_input_nodes if leads(n))
    product = first_product(above)
    start = f"product {product.node.name} ok, " if product is not None else ""
    return f"{start}stopped at {blocker.name}: {call_name(blocker)} of the logits is not known"


def _blocker(logits: fx.Node) -> fx.Node | None:
    """The nearest node that does something unknown to a product of queries and keys."""
    queue, seen = [logits], {logits}
    for node in queue:
        if any(leads(n) for n in node.all_input_nodes) and not leads(node):
            return node
        fresh = [n for n in node.all_input_nodes if n not in seen and len(shape_of(n)) >= 3]
        seen.update(fresh)
        queue += fresh[: LIMIT - len(queue)]
    return None
